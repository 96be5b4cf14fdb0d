//! The parent locator: how a differencing VHDX names its parent.

use std::collections::BTreeMap;

use uuid::{Uuid, uuid};

use super::{guid_from_bytes, guid_to_bytes};
use crate::error::FormatError;
use crate::format::parent::{Identity, ParentLink, ParentPath, PathKind};
use crate::units::{u64_from, usize_from_u32};

/// The only type of locator that is defined: the parent is a VHDX.
const VHDX_PARENT: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");
const HEADER_LEN: usize = 20;
const ENTRY_LEN: usize = 12;

const LINKAGE: &str = "parent_linkage";
const LINKAGE_2: &str = "parent_linkage2";
/// The keys of paths, in the order in which they are tried.
const PATHS: [(&str, PathKind); 3] = [
    ("relative_path", PathKind::Relative),
    ("volume_path", PathKind::Volume),
    ("absolute_win32_path", PathKind::Absolute),
];

/// The keys and values of a parent locator. [MS-VHDX 2.6.2.6]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentLocator {
    values: BTreeMap<String, String>,
}

impl ParentLocator {
    /// A locator of the parent whose `DataWriteGuid` is `linkage`, with the given paths, the
    /// relative one first.
    pub fn new(linkage: Uuid, relative: &str, absolute: &str) -> Self {
        let linkage = (LINKAGE.to_owned(), linkage.braced().to_string());
        let values = BTreeMap::from([linkage]);
        Self { values }.with_paths(relative, absolute)
    }

    /// This locator with these paths and no other ones; all else stays.
    pub fn with_paths(&self, relative: &str, absolute: &str) -> Self {
        let mut values = self.values.clone();
        for (key, _) in PATHS {
            values.remove(key);
        }
        let new = Self::paths(relative, absolute);
        values.extend(new.map(|(key, value)| (key.to_owned(), value)));
        Self { values }
    }

    /// The paths that are there, with their keys.
    fn paths(relative: &str, absolute: &str) -> impl Iterator<Item = (&'static str, String)> {
        [
            ("relative_path", relative),
            ("absolute_win32_path", absolute),
        ]
        .map(|(key, value)| (key, value.to_owned()))
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
    }

    /// Decodes the item.
    ///
    /// Text that is no UTF-16 is replaced by marks: a path that nobody can find, beside which
    /// another may be good.
    ///
    /// # Errors
    /// [`FormatError::Incompatible`] for another type of locator; [`FormatError::Corrupt`] for
    /// texts that do not lie in the item, or a key that is there twice.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let Some((header, _)) = bytes.split_first_chunk::<HEADER_LEN>() else {
            return Err(corrupt(format!("{} bytes", bytes.len()), "at least 20"));
        };
        let mut id = [0; 16];
        id.copy_from_slice(&header[..16]);
        let id = guid_from_bytes(id);
        if id != VHDX_PARENT {
            return Err(FormatError::incompatible(
                format!("a parent locator of type {id}"),
                format!("only {VHDX_PARENT}, a VHDX parent, is known"),
            ));
        }
        let count = usize::from(u16::from_le_bytes([header[18], header[19]]));
        let (entries, _) = bytes
            .get(HEADER_LEN..)
            .unwrap_or_default()
            .as_chunks::<ENTRY_LEN>();
        if entries.len() < count {
            return Err(corrupt(
                format!("{count} entries"),
                "as many as it has room for",
            ));
        }
        let mut values = BTreeMap::new();
        // Texts that share their bytes could make much of a little.
        let mut left = u64_from(bytes.len());
        for entry in entries.iter().take(count) {
            let [key, value] = texts_of(entry);
            for text in [&key, &value] {
                left = left
                    .checked_sub(u64_from(text.len()))
                    .ok_or_else(|| corrupt("texts that overlap", "texts side by side"))?;
            }
            let key = text(bytes, key)?;
            let value = text(bytes, value)?;
            if key.is_empty() {
                return Err(corrupt("a key without a name", "a name"));
            }
            if values.contains_key(&key) {
                return Err(corrupt(format!("key `{key}` twice"), "each key once"));
            }
            values.insert(key, value);
        }
        Ok(Self { values })
    }

    /// As it lies in the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let count = u16::try_from(self.values.len()).unwrap_or(u16::MAX);
        let mut table = guid_to_bytes(VHDX_PARENT).to_vec();
        table.extend([0; 2]);
        table.extend(count.to_le_bytes());
        let mut at = self
            .values
            .len()
            .saturating_mul(ENTRY_LEN)
            .saturating_add(HEADER_LEN);
        let mut texts = Vec::new();
        for (key, value) in &self.values {
            let (key, value) = (utf16(key), utf16(value));
            let value_at = at.saturating_add(key.len());
            for offset in [at, value_at] {
                table.extend(u32::try_from(offset).unwrap_or(u32::MAX).to_le_bytes());
            }
            for text in [&key, &value] {
                table.extend(u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes());
            }
            at = value_at.saturating_add(value.len());
            texts.extend(key);
            texts.extend(value);
        }
        table.extend(texts);
        table
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    /// Which parent it names, and where that may be.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] where the parent's identity is missing or unreadable.
    pub fn link(&self) -> Result<ParentLink, FormatError> {
        let linkage = |key: &str| {
            let parse = |text: &str| {
                Uuid::try_parse(text.trim())
                    .map_err(|_| corrupt(format!("`{text}` as `{key}`"), "a GUID"))
            };
            self.get(key).map(parse).transpose()
        };
        let first = linkage(LINKAGE)?
            .ok_or_else(|| corrupt(format!("no key `{LINKAGE}`"), "the parent's identity"))?;
        // While there is nothing to say it may be nil.
        let second = linkage(LINKAGE_2)?.filter(|guid| !guid.is_nil());
        Ok(ParentLink {
            identities: [Some(first), second.filter(|guid| *guid != first)]
                .into_iter()
                .flatten()
                .map(Identity::Vhdx)
                .collect(),
            paths: (PATHS.iter())
                .filter_map(|(key, kind)| {
                    let text = self.get(key)?;
                    (!text.is_empty()).then(|| ParentPath {
                        kind: *kind,
                        text: text.to_owned(),
                    })
                })
                .collect(),
        })
    }
}

fn corrupt(found: impl Into<String>, expected: impl Into<String>) -> FormatError {
    FormatError::corrupt("parent locator", found, expected)
}

/// The places of an entry's key and value in the item.
fn texts_of(entry: &[u8; ENTRY_LEN]) -> [std::ops::Range<usize>; 2] {
    let [k0, k1, k2, k3, v0, v1, v2, v3, kl0, kl1, vl0, vl1] = *entry;
    let range = |offset, len| {
        let start = usize_from_u32(u32::from_le_bytes(offset));
        start..start.saturating_add(usize::from(u16::from_le_bytes(len)))
    };
    [
        range([k0, k1, k2, k3], [kl0, kl1]),
        range([v0, v1, v2, v3], [vl0, vl1]),
    ]
}

fn text(bytes: &[u8], range: std::ops::Range<usize>) -> Result<String, FormatError> {
    let place = format!("a text at {:#x}..{:#x}", range.start, range.end);
    let bytes = bytes
        .get(range)
        .ok_or_else(|| corrupt(place.clone(), "one inside the item"))?;
    let (units, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(corrupt(place, "UTF-16, an even number of bytes"));
    }
    let units: Vec<u16> = units.iter().map(|unit| u16::from_le_bytes(*unit)).collect();
    let text = String::from_utf16_lossy(&units);
    Ok(text.trim_end_matches('\0').to_owned())
}

/// `text` in UTF-16, cut to what a 16-bit length can say.
fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16()
        .take(usize::from(u16::MAX / 2))
        .flat_map(u16::to_le_bytes)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const GUID: Uuid = uuid!("01234567-89ab-cdef-0123-456789abcdef");

    /// An item with these keys and values.
    fn item(values: &[(&str, &str)]) -> Vec<u8> {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        ParentLocator {
            values: values.iter().map(own).collect(),
        }
        .to_bytes()
    }

    fn link(values: &[(&str, &str)]) -> Result<ParentLink, FormatError> {
        ParentLocator::parse(&item(values))?.link()
    }

    #[test]
    fn a_locator_survives_the_file() {
        let locator = ParentLocator::new(GUID, ".\\b\u{e4}se.vhdx", "D:\\b\u{e4}se.vhdx");
        let read = ParentLocator::parse(&locator.to_bytes()).unwrap();
        assert_eq!(read, locator);
        assert_eq!(
            read.get("parent_linkage"),
            Some("{01234567-89ab-cdef-0123-456789abcdef}")
        );
        let link = read.link().unwrap();
        assert_eq!(link.identities, [Identity::Vhdx(GUID)]);
        let paths: Vec<_> = link
            .paths
            .iter()
            .map(|path| (path.kind, path.text.as_str()))
            .collect();
        assert_eq!(
            paths,
            [
                (PathKind::Relative, ".\\b\u{e4}se.vhdx"),
                (PathKind::Absolute, "D:\\b\u{e4}se.vhdx")
            ]
        );
    }

    #[test]
    fn paths_come_in_the_order_in_which_they_are_tried() {
        let found = link(&[
            ("absolute_win32_path", "a"),
            ("parent_linkage", "01234567-89AB-CDEF-0123-456789ABCDEF"),
            ("parent_linkage2", "{00000000-0000-0000-0000-000000000001}"),
            ("relative_path", "r"),
            ("volume_path", "v"),
            ("something else", "x"),
        ])
        .unwrap();
        let texts: Vec<_> = found.paths.iter().map(|path| path.text.as_str()).collect();
        assert_eq!(texts, ["r", "v", "a"]);
        let second = Identity::Vhdx(Uuid::from_u128(1));
        assert_eq!(found.identities, [Identity::Vhdx(GUID), second]);
    }

    #[test]
    fn a_locator_without_identity_is_refused() {
        for values in [
            &[][..],
            &[("parent_linkage", "what?")],
            &[("relative_path", "r")],
        ] {
            assert_eq!(
                link(values).unwrap_err().kind(),
                ErrorKind::Corrupt,
                "{values:?}"
            );
        }
        let nil = ("parent_linkage2", "{00000000-0000-0000-0000-000000000000}");
        let found = link(&[("parent_linkage", &GUID.to_string()), nil]).unwrap();
        assert_eq!(found.identities, [Identity::Vhdx(GUID)]);
    }

    #[test]
    fn hostile_items_are_refused() {
        let good = item(&[("parent_linkage", "x"), ("relative_path", "y")]);
        let poked = |at: usize, bytes: &[u8]| {
            let mut item = good.clone();
            item[at..at + bytes.len()].copy_from_slice(bytes);
            ParentLocator::parse(&item).unwrap_err().kind()
        };
        assert_eq!(poked(0, &[1]), ErrorKind::Incompatible);
        assert_eq!(poked(18, &[0xff, 0xff]), ErrorKind::Corrupt);
        assert_eq!(poked(20, &[0xff; 4]), ErrorKind::Corrupt, "key outside");
        assert_eq!(poked(24, &[0xff; 4]), ErrorKind::Corrupt, "value outside");
        assert_eq!(poked(28, &[0xff; 2]), ErrorKind::Corrupt, "key too long");
        assert_eq!(poked(28, &[3, 0]), ErrorKind::Corrupt, "half a character");
        assert_eq!(poked(28, &[0, 0]), ErrorKind::Corrupt, "no name");
        // The second entry names the first one's key.
        let first: Vec<u8> = [&good[20..24], &good[24..28], &good[28..32]].concat();
        assert_eq!(poked(32, &first), ErrorKind::Corrupt, "a key twice");
        for len in [0, 19, 25, 40] {
            assert!(ParentLocator::parse(&good[..len]).is_err(), "{len} bytes");
        }
        // 60000 entries that all name the same 60000 bytes.
        let mut bomb = good[..18].to_vec();
        bomb.extend(60_000_u16.to_le_bytes());
        for _ in 0..60_000 {
            bomb.extend([20, 0, 0, 0, 20, 0, 0, 0, 0x60, 0xea, 0x60, 0xea]);
        }
        assert_eq!(
            ParentLocator::parse(&bomb).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }
}
