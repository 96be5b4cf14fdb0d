//! Errors and names as text.

use std::error::Error;

/// An error with its causes, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Transparent errors repeat their cause.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// `text` as it may go to a terminal or into a log, in one line: names of files and paths out of images
/// may hold anything. Control characters, and those that change the direction of text or cannot be
/// seen, become `\u{...}`.
pub fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || is_deceptive(c) {
            plain.extend(c.escape_unicode());
        } else {
            plain.push(c);
        }
    }
    plain
}

/// Whether it is a line separator, or one of the format characters (Unicode's class Cf and the like)
/// that reorder or hide what is around them.
fn is_deceptive(c: char) -> bool {
    matches!(
        u32::from(c),
        0xad | 0x61c
            | 0x180e
            | 0x200b..=0x200f
            | 0x2028..=0x202e
            | 0x2060..=0x206f
            | 0xfeff
            | 0xfff9..=0xfffb
            | 0xe0000..=0xe007f
    )
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::error::{CompactError, DiskError};

    #[test]
    fn causes_are_said_once() {
        let error = DiskError::Io {
            action: "read",
            source: io::Error::other("no luck"),
        };
        assert_eq!(chain(&error), "cannot read: no luck");
        let twice = CompactError::Disk(error);
        assert_eq!(chain(&twice), "cannot read: no luck");
    }

    #[test]
    fn what_deceives_is_shown() {
        for (text, shown) in [
            ("disk 1 (b\u{e4}r).vhd", "disk 1 (b\u{e4}r).vhd"),
            ("a\x1b[2Jb\n", "a\\u{1b}[2Jb\\u{a}"),
            ("x\u{202e}dhv.exe", "x\\u{202e}dhv.exe"),
            ("\u{9b}\u{2066}\u{feff}", "\\u{9b}\\u{2066}\\u{feff}"),
        ] {
            assert_eq!(plain(text), shown);
        }
    }
}
