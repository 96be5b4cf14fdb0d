//! What a reparse point stands for.

use windows_sys::Win32::System::SystemServices::{
    IO_REPARSE_TAG_DEDUP, IO_REPARSE_TAG_MOUNT_POINT, IO_REPARSE_TAG_SYMLINK, IO_REPARSE_TAG_WOF,
};

/// What a reparse tag makes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    /// It leads elsewhere: a symbolic link, a junction, a place where a volume is mounted.
    Link,
    /// It is a file or directory like others, whose bytes the host stores in its own way:
    /// deduplicated, compressed, or kept in step with a cloud.
    Stored,
    /// Who knows.
    Unknown,
}

/// What this tag says.
pub(crate) fn tag(tag: u32) -> Tag {
    /// `IO_REPARSE_TAG_CLOUD` to `IO_REPARSE_TAG_CLOUD_F`: the digit tells them apart.
    const CLOUD: u32 = 0x9000_001a;
    match tag {
        IO_REPARSE_TAG_SYMLINK | IO_REPARSE_TAG_MOUNT_POINT => Tag::Link,
        IO_REPARSE_TAG_DEDUP | IO_REPARSE_TAG_WOF => Tag::Stored,
        cloud if cloud & !0xf000 == CLOUD => Tag::Stored,
        _ => Tag::Unknown,
    }
}

/// Where the link leads whose reparse data (`REPARSE_DATA_BUFFER`) that is, as Windows itself reads
/// it, but for the prefix of its kernel; `None` where it is none.
pub(crate) fn target(data: &[u8]) -> Option<Vec<u16>> {
    const KERNEL: [u16; 4] = [0x5c, 0x3f, 0x3f, 0x5c];
    let number = |at: usize| {
        let bytes = data.get(at..at + 2)?.try_into().ok()?;
        Some(usize::from(u16::from_le_bytes(bytes)))
    };
    let found = u32::from_le_bytes(data.get(..4)?.try_into().ok()?);
    let names = match found {
        IO_REPARSE_TAG_SYMLINK => 20,
        IO_REPARSE_TAG_MOUNT_POINT => 16,
        _ => return None,
    };
    let (start, len) = (names + number(8)?, number(10)?);
    let (units, []) = data.get(start..start + len)?.as_chunks() else {
        return None;
    };
    let mut target: Vec<u16> = units.iter().map(|unit| u16::from_le_bytes(*unit)).collect();
    if target.starts_with(&KERNEL) {
        target[1] = 0x5c;
    }
    Some(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(tag: u32, flags: Option<u32>, text: &str) -> Vec<u8> {
        let text: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let len = u16::try_from(text.len()).unwrap().to_le_bytes();
        let mut data = tag.to_le_bytes().to_vec();
        data.extend([0; 4]);
        // The name for people comes first here: two units that are not the target.
        data.extend([4, 0, len[0], len[1], 0, 0, 4, 0]);
        data.extend(flags.into_iter().flat_map(u32::to_le_bytes));
        data.extend([b'x', 0, b'y', 0]);
        data.extend(text);
        data
    }

    #[test]
    fn targets_are_read() {
        let link = |text| target(&data(IO_REPARSE_TAG_SYMLINK, Some(1), text));
        let junction = |text| target(&data(IO_REPARSE_TAG_MOUNT_POINT, None, text));
        let units = |text: &str| Some(text.encode_utf16().collect::<Vec<u16>>());
        assert_eq!(link(r"..\base.vhd"), units(r"..\base.vhd"));
        assert_eq!(link(r"\??\C:\a"), units(r"\\?\C:\a"));
        assert_eq!(junction(r"\??\Volume{1}\"), units(r"\\?\Volume{1}\"));
        let dedup = data(IO_REPARSE_TAG_DEDUP, None, "a");
        assert_eq!(target(&dedup), None);
        let whole = data(IO_REPARSE_TAG_SYMLINK, Some(1), r"..\base.vhd");
        for len in 0..whole.len() {
            assert_eq!(target(&whole[..len]), None, "{len}");
        }
    }

    #[test]
    fn only_what_is_known_is_a_file() {
        for (found, meant) in [
            (0xa000_000c, Tag::Link),
            (0xa000_0003, Tag::Link),
            (0x8000_0013, Tag::Stored),
            (0x9000_001a, Tag::Stored),
            (0x9000_701a, Tag::Stored),
            // A WSL link, a socket, a program of the shop.
            (0xa000_001d, Tag::Unknown),
            (0x8000_0023, Tag::Unknown),
            (0x8000_001b, Tag::Unknown),
        ] {
            assert_eq!(tag(found), meant, "{found:#x}");
        }
    }
}
