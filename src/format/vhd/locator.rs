//! Where a differencing VHD says that its parent is: the parent locators, and the parent's name in
//! the dynamic header. [VHD 1.0, "Parent Locator Entry"]

use super::DynamicHeader;
use crate::format::foreign_path::ForeignPath;
use crate::format::parent::{ParentPath, PathKind};
use crate::units::{FileOffset, FileRange};

/// The most bytes that a locator's data may have: a path of Windows has at most 64 KiB.
pub const MAX_LOCATOR_LEN: u64 = 64 << 10;

/// What a locator holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Platform {
    /// `W2ru`: a path from the child's directory, UTF-16 little-endian in all files seen.
    RelativeUtf16,
    /// `Wi2r`: the same in some code page, deprecated.
    RelativeAnsi,
    /// `W2ku`: an absolute path, UTF-16 little-endian.
    AbsoluteUtf16,
    /// `Wi2k`: the same in some code page, deprecated.
    AbsoluteAnsi,
    /// `MacX`: a file URL, UTF-8. Xen writes relative ones.
    MacUrl,
}

impl Platform {
    fn of(code: u32) -> Option<Self> {
        match &code.to_be_bytes() {
            b"W2ru" => Some(Self::RelativeUtf16),
            b"Wi2r" => Some(Self::RelativeAnsi),
            b"W2ku" => Some(Self::AbsoluteUtf16),
            b"Wi2k" => Some(Self::AbsoluteAnsi),
            b"MacX" => Some(Self::MacUrl),
            // Among them `Mac `, an alias of old Mac OS, which only that can follow.
            _ => None,
        }
    }
}

/// A parent locator that this crate can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locator {
    /// What it holds.
    pub platform: Platform,
    /// Where its data lies, as the file says: unchecked.
    pub data: FileRange,
}

impl Locator {
    /// The path in the locator's data; `None` where there is none.
    pub fn decode(&self, data: &[u8]) -> Option<ParentPath> {
        let text = match self.platform {
            Platform::RelativeUtf16 | Platform::AbsoluteUtf16 => utf16(data, u16::from_le_bytes),
            Platform::RelativeAnsi | Platform::AbsoluteAnsi => ansi(data),
            Platform::MacUrl => path_of_url(&ansi(data)),
        };
        let kind = match self.platform {
            Platform::RelativeUtf16 | Platform::RelativeAnsi => PathKind::Relative,
            Platform::AbsoluteUtf16 | Platform::AbsoluteAnsi | Platform::MacUrl => kind_of(&text)?,
        };
        (!text.is_empty()).then_some(ParentPath { kind, text })
    }
}

impl DynamicHeader {
    /// The parent locators that this crate can read, in the order of the header.
    pub fn locators(&self) -> impl Iterator<Item = Locator> + '_ {
        let all = self.raw.parent_locators.iter();
        all.filter_map(|raw| {
            let start = FileOffset::new(raw.platform_data_offset.get());
            let len = u64::from(raw.platform_data_length.get());
            Some(Locator {
                platform: Platform::of(raw.platform_code.get())?,
                data: FileRange::new(start, len),
            })
        })
    }

    /// The parent's name: by convention without a directory, but Windows 10 writes the full path.
    pub fn parent_name(&self) -> Option<ParentPath> {
        let text = utf16(&self.raw.parent_unicode_name, u16::from_be_bytes);
        let kind = kind_of(&text)?;
        Some(ParentPath { kind, text })
    }
}

/// How a path is meant, by its looks; `None` where it is none.
fn kind_of(text: &str) -> Option<PathKind> {
    let is_volume = text
        .get(..11)
        .is_some_and(|start| start.eq_ignore_ascii_case(r"\\?\Volume{"));
    match ForeignPath::parse(text)?.is_relative() {
        true => Some(PathKind::Relative),
        false if is_volume => Some(PathKind::Volume),
        false => Some(PathKind::Absolute),
    }
}

/// Text up to the first zero; what is no UTF-16 becomes a replacement character.
fn utf16(bytes: &[u8], decode: fn([u8; 2]) -> u16) -> String {
    const BYTE_ORDER_MARK: u16 = 0xfeff;
    let (units, _odd) = bytes.as_chunks::<2>();
    let units: Vec<u16> = (units.iter().map(|unit| decode(*unit)))
        .skip_while(|unit| *unit == BYTE_ORDER_MARK)
        .take_while(|unit| *unit != 0)
        .collect();
    String::from_utf16_lossy(&units)
}

/// Text up to the first zero: UTF-8 if it is, else Latin 1, for want of knowing the code page.
fn ansi(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    match str::from_utf8(text) {
        Ok(text) => text.to_owned(),
        Err(_) => text.iter().copied().map(char::from).collect(),
    }
}

/// The path that a file URL stands for. Text that is none stands for itself.
fn path_of_url(text: &str) -> String {
    let is_url = text
        .get(..5)
        .is_some_and(|scheme| scheme.eq_ignore_ascii_case("file:"));
    let Some(rest) = text.get(5..).filter(|_| is_url) else {
        return text.to_owned();
    };
    let path = match rest.strip_prefix("//") {
        None => rest,
        Some(with_host) => match with_host.split_once('/') {
            // `file://./base.vhd`, as Xen writes it, names no host.
            Some(("." | "..", _)) | None => with_host,
            Some((host, _)) if host.is_empty() || host.eq_ignore_ascii_case("localhost") => {
                with_host.get(host.len()..).unwrap_or_default()
            }
            // Some other host's share.
            Some(_) => rest,
        },
    };
    percent_decoded(path)
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        let escaped = behind.first_chunk::<2>().filter(|_| *first == b'%');
        let byte = escaped.and_then(|digits| {
            let digits = str::from_utf8(digits).ok()?;
            // `from_str_radix` takes a sign, too.
            let hexadecimal = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            hexadecimal
                .then(|| u8::from_str_radix(digits, 16).ok())
                .flatten()
        });
        match byte {
            Some(byte) => {
                bytes.push(byte);
                rest = behind.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(platform: Platform, data: &[u8]) -> Option<(PathKind, String)> {
        let data_range = FileRange::new(FileOffset::new(0), 0);
        let locator = Locator {
            platform,
            data: data_range,
        };
        let path = locator.decode(data)?;
        Some((path.kind, path.text))
    }

    fn le(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn windows_paths() {
        use PathKind::{Absolute, Relative, Volume};
        for (platform, text, kind) in [
            (Platform::RelativeUtf16, r".\d\\u{e4}.vhd", Relative),
            (Platform::AbsoluteUtf16, r"D:\d\base.vhd", Absolute),
            (Platform::AbsoluteUtf16, r"\\?\Volume{1}\base.vhd", Volume),
            // Xen's.
            (Platform::AbsoluteUtf16, r".\base.vhd", Relative),
        ] {
            let mut data = le(text);
            assert_eq!(decode(platform, &data), Some((kind, text.to_owned())));
            // Padding, and whatever lies behind it.
            data.extend([0, 0, 65]);
            assert_eq!(decode(platform, &data), Some((kind, text.to_owned())));
        }
        assert_eq!(
            decode(Platform::RelativeAnsi, b".\\\xe4.vhd\0\0"),
            Some((Relative, ".\\\u{e4}.vhd".to_owned()))
        );
    }

    #[test]
    fn broken_text_is_read_as_far_as_it_goes() {
        let lone = [b'a', 0, 0, 0xd8, b'b', 0, 7];
        let (_, text) = decode(Platform::RelativeUtf16, &lone).unwrap();
        assert_eq!(text, "a\u{fffd}b");
        for empty in [&[][..], &[0], &[0, 0, 65, 0]] {
            for platform in [
                Platform::RelativeUtf16,
                Platform::AbsoluteUtf16,
                Platform::RelativeAnsi,
                Platform::AbsoluteAnsi,
                Platform::MacUrl,
            ] {
                assert_eq!(decode(platform, empty), None);
            }
        }
    }

    #[test]
    fn urls() {
        use PathKind::{Absolute, Relative};
        for (url, kind, path) in [
            (
                "file:///srv/a%20b/100%25.vhd",
                Absolute,
                "/srv/a b/100%.vhd",
            ),
            ("FILE://localhost/srv/b.vhd", Absolute, "/srv/b.vhd"),
            ("file:/srv/b.vhd", Absolute, "/srv/b.vhd"),
            ("file://./base.vhd", Relative, "./base.vhd"),
            ("file://../base.vhd", Relative, "../base.vhd"),
            ("file://base.vhd", Relative, "base.vhd"),
            ("file://nas/vms/b.vhd", Absolute, "//nas/vms/b.vhd"),
            ("/srv/%41.vhd", Absolute, "/srv/%41.vhd"),
            ("file:///%c3%a4%+1%zz%4", Absolute, "/\u{e4}%+1%zz%4"),
            ("file:///%ff", Absolute, "/\u{fffd}"),
        ] {
            let found = decode(Platform::MacUrl, url.as_bytes());
            assert_eq!(found, Some((kind, path.to_owned())), "{url}");
        }
        assert_eq!(decode(Platform::MacUrl, b"file:///a%00b"), None);
        assert_eq!(decode(Platform::MacUrl, b"file:"), None);
    }
}
