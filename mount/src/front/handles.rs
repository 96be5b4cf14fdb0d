//! Numbers for what users of the mount have open.

use std::sync::Arc;

use parking_lot::RwLock;

/// A table of open things. Getting one takes a shared lock for some nanoseconds; nothing is done
/// while it is held.
pub(crate) struct Handles<T> {
    table: RwLock<Table<T>>,
}

struct Table<T> {
    entries: Vec<Option<Arc<T>>>,
    free: Vec<usize>,
    closed: bool,
}

impl<T> Handles<T> {
    pub(crate) fn new() -> Self {
        let table = Table {
            entries: Vec::new(),
            free: Vec::new(),
            closed: false,
        };
        Self {
            table: RwLock::new(table),
        }
    }

    /// A number for it, until that is removed. `None` after [`Self::close`].
    pub(crate) fn insert(&self, value: T) -> Option<u64> {
        let value = Some(Arc::new(value));
        let mut table = self.table.write();
        if table.closed {
            return None;
        }
        let index = match table.free.pop() {
            Some(index) => {
                table.entries[index] = value;
                index
            }
            None => {
                table.entries.push(value);
                table.entries.len() - 1
            }
        };
        u64::try_from(index).ok()
    }

    pub(crate) fn get(&self, number: u64) -> Option<Arc<T>> {
        self.table
            .read()
            .entries
            .get(usize::try_from(number).ok()?)?
            .clone()
    }

    /// All there are right now.
    #[cfg(windows)]
    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.table
            .read()
            .entries
            .iter()
            .flatten()
            .cloned()
            .collect()
    }

    /// [`Self::close`] if there are none; how many there are otherwise.
    pub(crate) fn close_if_empty(&self) -> Result<(), usize> {
        let mut table = self.table.write();
        match table.entries.iter().flatten().count() {
            0 => {
                table.closed = true;
                Ok(())
            }
            count => Err(count),
        }
    }

    /// Removes all, for good. What a request is working with right now stays until that is done.
    pub(crate) fn close(&self) {
        let mut table = self.table.write();
        table.closed = true;
        let removed = std::mem::take(&mut table.entries);
        drop(table);
        drop(removed);
    }

    pub(crate) fn remove(&self, number: u64) {
        let Ok(index) = usize::try_from(number) else {
            return;
        };
        let mut table = self.table.write();
        let removed = table.entries.get_mut(index).and_then(Option::take);
        if removed.is_some() {
            table.free.push(index);
        }
        // What it takes to close the thing is not done under the lock.
        drop(table);
        drop(removed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_lead_back_until_removed() {
        let handles = Handles::new();
        let insert = |value| handles.insert(value).unwrap();
        let (a, b) = (insert('a'), insert('b'));
        assert_eq!(
            (*handles.get(a).unwrap(), *handles.get(b).unwrap()),
            ('a', 'b')
        );
        let held = handles.get(a).unwrap();
        handles.remove(a);
        handles.remove(a);
        assert!(handles.get(a).is_none() && *held == 'a');
        assert!(handles.get(u64::MAX).is_none());
        let (c, d) = (insert('c'), insert('d'));
        assert_eq!(
            [b, c, d].map(|number| *handles.get(number).unwrap()),
            ['b', 'c', 'd']
        );
        #[cfg(windows)]
        assert_eq!(handles.all().len(), 3);
        assert_eq!(handles.close_if_empty(), Err(3));
        handles.close();
        assert_eq!(handles.close_if_empty(), Ok(()));
        assert!(handles.get(b).is_none() && handles.insert('e').is_none());
    }
}
