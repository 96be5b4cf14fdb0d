//! Files that are something else than a virtual disk of ours, told by their first bytes.

/// Bytes of a file's start that are enough to tell.
pub const LOOK_LEN: usize = 0x8000 + 6;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// In words, with its article.
    pub what: &'static str,
    /// What to do with it.
    pub advice: Advice,
}

/// What to do with a file that is no virtual disk of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// It is an image that can be converted; this is what `qemu-img` calls its format.
    Convert(&'static str),
    /// It may hold what is wanted.
    Unpack,
    /// It came instead of what is wanted.
    FetchAgain,
    /// Nothing has come.
    CopyAgain,
    /// It is a pointer of Git LFS.
    LfsPull,
    /// Nothing that would help.
    None,
}

const fn convert(what: &'static str, format: &'static str) -> Foreign {
    Foreign {
        what,
        advice: Advice::Convert(format),
    }
}

const fn packed(what: &'static str) -> Foreign {
    Foreign {
        what,
        advice: Advice::Unpack,
    }
}

const fn other(what: &'static str) -> Foreign {
    Foreign {
        what,
        advice: Advice::None,
    }
}

/// The bytes at an offset, and what has them. The first that fits counts.
const MAGICS: &[(usize, &[u8], Foreign)] = &[
    (0, b"QFI\xfb\0\0\0\x01", convert("a qcow image", "qcow")),
    (0, b"QFI\xfb", convert("a qcow2 image", "qcow2")),
    (0, b"QED\0", convert("a QED image", "qed")),
    (0, b"KDMV", convert("a VMDK image", "vmdk")),
    (0, b"COWD", convert("a VMDK image", "vmdk")),
    (0, b"# Disk DescriptorFile", convert("a VMDK image", "vmdk")),
    (0x40, b"\x7f\x10\xda\xbe", convert("a VDI image", "vdi")),
    (
        0,
        b"WithoutFreeSpace",
        convert("a Parallels image", "parallels"),
    ),
    (
        0,
        b"WithouFreSpacExt",
        convert("a Parallels image", "parallels"),
    ),
    (0, b"\x1f\x8b", packed("compressed by gzip")),
    (0, b"BZh", packed("compressed by bzip2")),
    (0, b"\xfd7zXZ\0", packed("compressed by xz")),
    (0, b"\x28\xb5\x2f\xfd", packed("compressed by zstd")),
    (0, b"\x04\x22\x4d\x18", packed("compressed by lz4")),
    (0, b"PK\x03\x04", packed("a ZIP archive")),
    (0, b"PK\x05\x06", packed("a ZIP archive")),
    (0, b"7z\xbc\xaf\x27\x1c", packed("a 7z archive")),
    (0, b"Rar!\x1a\x07", packed("a RAR archive")),
    (0, b"MSCF", packed("a cabinet archive")),
    (0, b"MSWIM\0\0\0", packed("a WIM archive")),
    (257, b"ustar", packed("a tar archive")),
    (0, b"\x7fELF", other("a program (ELF)")),
    (0, b"%PDF-", other("a PDF document")),
    (
        0x8001,
        b"CD001",
        convert("an image of a CD (ISO 9660)", "raw"),
    ),
    (
        512,
        b"EFI PART",
        convert("a raw image of a disk (GPT)", "raw"),
    ),
    (
        3,
        b"NTFS    ",
        convert("a raw image of a file system (NTFS)", "raw"),
    ),
    (
        3,
        b"EXFAT   ",
        convert("a raw image of a file system (exFAT)", "raw"),
    ),
    (
        0,
        b"XFSB",
        convert("a raw image of a file system (XFS)", "raw"),
    ),
    (
        0x438,
        b"\x53\xef",
        convert("a raw image of a file system (ext)", "raw"),
    ),
];

/// What a file is that begins with `start`, which is empty only if the file is, if that is something known.
pub fn recognise(start: &[u8]) -> Option<Foreign> {
    if start.is_empty() {
        return Some(Foreign {
            what: "an empty file",
            advice: Advice::CopyAgain,
        });
    }
    let has = |at: usize, magic: &[u8]| start.get(at..).is_some_and(|at| at.starts_with(magic));
    let known = MAGICS.iter().find(|(at, magic, _)| has(*at, magic));
    if let Some((_, _, found)) = known {
        return Some(*found);
    }
    if has(510, b"\x55\xaa") {
        return Some(convert("a raw image of a disk (MBR)", "raw"));
    }
    text(start)
}

/// What text a file is, if it is some.
fn text(start: &[u8]) -> Option<Foreign> {
    const ENOUGH: usize = 512;
    let start = start.get(..ENOUGH).unwrap_or(start);
    let start = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start);
    // A character may be cut at the end.
    let text = match std::str::from_utf8(start) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(start.get(..error.valid_up_to())?).ok()?
        }
        Err(_) => return None,
    };
    let is_printed = |c: char| !c.is_control() || c.is_ascii_whitespace();
    if !text.contains(|c: char| c.is_ascii_whitespace() || c == '<')
        || !text.chars().all(is_printed)
    {
        return None;
    }
    let lower = text.trim_start().to_ascii_lowercase();
    let again = |what| {
        Some(Foreign {
            what,
            advice: Advice::FetchAgain,
        })
    };
    match () {
        () if lower.is_empty() => None,
        () if lower.starts_with("version https://git-lfs") => Some(Foreign {
            what: "a pointer of Git LFS",
            advice: Advice::LfsPull,
        }),
        () if lower.starts_with("<!doctype html") || lower.starts_with("<html") => {
            again("an HTML page")
        }
        () if lower.starts_with("<?xml") => again("an XML document"),
        () => again("text"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn what(start: &[u8]) -> Option<&'static str> {
        recognise(start).map(|found| found.what)
    }

    #[test]
    fn each_is_told_by_its_bytes() {
        for (at, magic, found) in MAGICS {
            let mut start = vec![0; LOOK_LEN];
            start[*at..*at + magic.len()].copy_from_slice(magic);
            assert_eq!(recognise(&start), Some(*found), "{magic:?}");
        }
        let mut disk = vec![0; 512];
        disk[510..].copy_from_slice(b"\x55\xaa");
        assert_eq!(what(&disk), Some("a raw image of a disk (MBR)"));
    }

    #[test]
    fn text_of_all_kinds() {
        for (start, found) in [
            (&b"<html>404 not found</html>"[..], "an HTML page"),
            (b"\xef\xbb\xbf\r\n<!DOCTYPE HTML>", "an HTML page"),
            (b"<?xml version=\"1.0\"?><Error/>", "an XML document"),
            (b"404: Not Found\n", "text"),
            (b"{ \"error\": 1 }", "text"),
            ("gr\u{fc}\u{df}e an alle".as_bytes(), "text"),
            (
                b"version https://git-lfs.github.com/spec/v1\n",
                "a pointer of Git LFS",
            ),
        ] {
            assert_eq!(what(start), Some(found));
        }
        // A character that is cut by the end of what was looked at.
        let long = "\u{fc} ".repeat(400);
        assert_eq!(what(&long.as_bytes()[..511]), Some("text"));
        assert_eq!(what(b""), Some("an empty file"));
        for start in [
            &b"\0\0\0\0"[..],
            &[0x5a; 4096],
            b"vhdxfile",
            b"conectix\0\0",
            b"\n\n",
        ] {
            assert_eq!(what(start), None, "{start:?}");
        }
    }
}
