//! Numbers, modes and access control lists.

use std::io;
use std::path::Path;

use crate::storage::host::access_list;
use crate::storage::host::pin::Stat;

/// Whoever asks for something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub uid: u32,
    /// Its groups, the main one among them.
    pub groups: Vec<u32>,
}

/// What may be done with a file, as one digit of a mode has it.
const READ: u32 = 4;
const SEARCH: u32 = 1;

impl User {
    /// Whether the host lets it read the file at `path`, an absolute path without symbolic links, as far
    /// as the directories from `top` on downwards and the file itself are concerned.
    pub(in crate::library) fn may_read(&self, path: &Path, top: &Path) -> bool {
        let own = rustix::process::geteuid().as_raw();
        if self.uid == 0 || self.uid == own {
            return true;
        }
        let allows = |place: &Path, wanted| {
            Stat::at(place).is_ok_and(|stat| {
                let mode = shown_mode(&stat, || access_list(place, false));
                self.allows(&Stat { mode, ..stat }, wanted)
            })
        };
        let mut directories = path
            .ancestors()
            .skip(1)
            .take_while(|up| up.starts_with(top));
        allows(path, READ) && directories.all(|up| allows(up, SEARCH))
    }

    fn allows(&self, stat: &Stat, wanted: u32) -> bool {
        let digit = match () {
            () if stat.uid == self.uid => 6,
            () if self.groups.contains(&stat.gid) => 3,
            () => 0,
        };
        (stat.mode >> digit) & wanted == wanted
    }
}

/// The mode of a file with nothing in it that the file's access control list, which `list` reads, denies
/// anybody.
///
/// The group's digit of a file with such a list is the list's mask, and its other users are others than the
/// list's. What is left of both is what all of them have, so that nobody gets more than the list says.
pub(in crate::library) fn shown_mode(
    stat: &Stat,
    list: impl FnOnce() -> io::Result<Vec<u8>>,
) -> u32 {
    if stat.mode & 0o077 == 0 {
        return stat.mode;
    }
    match list() {
        Ok(list) if list.is_empty() => stat.mode,
        Ok(list) => limited(stat.mode, &list),
        // There may be one.
        Err(error) => {
            log::debug!("an access control list cannot be read: {error}");
            stat.mode & !0o077
        }
    }
}

/// `mode` without what the access control list in `bytes` (`acl(5)`, as the kernel stores it) denies.
fn limited(mode: u32, bytes: &[u8]) -> u32 {
    const VERSION: [u8; 4] = 2_u32.to_le_bytes();
    let (entries, rest) = match bytes.strip_prefix(&VERSION) {
        Some(entries) => entries.as_chunks::<8>(),
        None => return mode & !0o077,
    };
    let (mut users, mut groups) = (None, None);
    let (mut group, mut mask) = ((mode >> 3) & 7, 7);
    let both = |one: Option<u32>, other| Some(one.unwrap_or(7) & other);
    for entry in entries {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let allowed = u32::from(u16::from_le_bytes([entry[2], entry[3]]));
        match tag {
            0x02 => users = both(users, allowed),
            0x04 => group = allowed,
            0x08 => groups = both(groups, allowed),
            0x10 => mask = allowed,
            _ => {}
        }
    }
    if !rest.is_empty() {
        return mode & !0o077;
    }
    // The mask concerns the group and all that is named. Who is in the group, or one of the others, may
    // be named, too.
    let named = |found: Option<u32>| found.map_or(7, |found| found & mask);
    let (users, groups) = (named(users), named(groups));
    let group = group & mask & users & 7;
    mode & !0o077 | (group << 3) | (mode & users & groups & 7)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[(u16, u16)]) -> Vec<u8> {
        let mut bytes = 2_u32.to_le_bytes().to_vec();
        for (tag, allowed) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(allowed.to_le_bytes());
            bytes.extend([0; 4]);
        }
        bytes
    }

    #[test]
    fn a_list_takes_away_and_never_adds() {
        let (owner, user, own_group, group, mask, other) = (1, 2, 4, 8, 0x10, 0x20);
        for (mode, entries, shown) in [
            // Without named users and groups it says what the mode says.
            (0o640, &[(owner, 6), (own_group, 4), (other, 0)][..], 0o640),
            // The mask is not what the owning group has.
            (
                0o660,
                &[(owner, 6), (user, 6), (own_group, 0), (mask, 6), (other, 0)],
                0o600,
            ),
            // Who is named may have less than the others.
            (
                0o644,
                &[(owner, 6), (user, 0), (own_group, 4), (mask, 4), (other, 4)],
                0o600,
            ),
            (
                0o644,
                &[
                    (owner, 6),
                    (own_group, 4),
                    (group, 0),
                    (mask, 4),
                    (other, 4),
                ],
                0o640,
            ),
            (
                0o664,
                &[(owner, 6), (user, 6), (own_group, 4), (mask, 6), (other, 4)],
                0o644,
            ),
        ] {
            assert_eq!(limited(mode, &list(entries)), shown, "{entries:?}");
        }
        for broken in [&[][..], &[3, 0, 0, 0], &[2, 0, 0, 0, 1]] {
            assert_eq!(limited(0o666, broken), 0o600);
        }
    }

    #[test]
    fn the_first_class_that_fits_decides() {
        let stat = Stat::at(Path::new("/")).unwrap();
        let stat = Stat {
            uid: 7,
            gid: 8,
            ..stat
        };
        let user = |uid, group| User {
            uid,
            groups: vec![group],
        };
        for (mode, who, may) in [
            (0o400, user(7, 1), true),
            (0o044, user(7, 8), false),
            (0o040, user(1, 8), true),
            (0o404, user(1, 8), false),
            (0o004, user(1, 1), true),
            (0o440, user(1, 1), false),
        ] {
            let stat = Stat { mode, ..stat };
            assert_eq!(who.allows(&stat, READ), may, "{mode:o} {who:?}");
        }
    }
}
