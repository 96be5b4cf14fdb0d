//! Paths as other programs, mostly on Windows, write them into a child to say where its parent is.
//!
//! ```text
//! .\base.vhd   ..\a\base.vhd   base.vhd              from the child's directory
//! /srv/disks/base.vhd   \srv\disks\base.vhd          from the root
//! D:\a\base.vhd   \\?\D:\a\base.vhd                  from a drive
//! \\?\Volume{1234}\a\base.vhd                       from a volume
//! \\server\share\a\base.vhd   \\?\UNC\server\share\base.vhd   from a server; the share is a name
//! ```
//!
//! Backslashes and slashes both separate; a file name with a backslash in it cannot be named so.
//! `..` takes a name away without asking what it is, as Windows does.

/// More names than any path that a host would take.
const MAX_NAMES: usize = 128;

/// Where a path starts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Anchor {
    /// In the directory of the file that holds the path, or that many directories above it.
    Directory {
        /// How many directories further up.
        up: usize,
    },
    /// At the root of a file tree.
    Root,
    /// At the root of a drive of Windows'.
    Drive(char),
    /// At the root of a volume, `Volume{...}`.
    Volume(String),
    /// At a server; the first name is that of a share.
    Server(String),
    /// On something that has no name here.
    Elsewhere,
}

/// A path taken apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ForeignPath {
    /// Where it starts.
    pub anchor: Anchor,
    /// The names from there on, neither empty nor `.` nor `..`. At least one.
    pub names: Vec<String>,
}

impl ForeignPath {
    /// Takes `text` apart; `None` where it names nothing, or more than a path can hold.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.replace('\\', "/");
        let (absolute, rest) = split_anchor(&text);
        let mut up = 0_usize;
        let mut names: Vec<&str> = Vec::new();
        for name in rest.split('/') {
            match name {
                "" | "." => {}
                ".." => {
                    if names.pop().is_none() {
                        // The root's parent is the root.
                        up = up.saturating_add(1);
                    }
                }
                name if names.len() < MAX_NAMES => names.push(name),
                _ => return None,
            }
        }
        let usable = !names.is_empty() && up <= MAX_NAMES && !rest.contains('\0');
        usable.then(|| Self {
            anchor: absolute.unwrap_or(Anchor::Directory { up }),
            names: names.into_iter().map(str::to_owned).collect(),
        })
    }

    /// Whether it starts at the directory of the file that holds it.
    pub fn is_relative(&self) -> bool {
        matches!(self.anchor, Anchor::Directory { .. })
    }
}

/// What an absolute path starts at, and the rest of it. `text` has slashes only.
fn split_anchor(text: &str) -> (Option<Anchor>, &str) {
    for prefix in ["//?/", "//./", "/??/"] {
        let Some(rest) = text.strip_prefix(prefix) else {
            continue;
        };
        if let Some(share) = strip_ignoring_case(rest, "UNC/") {
            return at_first(share, Anchor::Server);
        }
        if strip_ignoring_case(rest, "Volume{").is_some() {
            return at_first(rest, Anchor::Volume);
        }
        return strip_drive(rest).unwrap_or((Some(Anchor::Elsewhere), rest));
    }
    if let Some(share) = text.strip_prefix("//") {
        // A share may well be mounted here under its own name.
        return at_first(share, Anchor::Server);
    }
    if let Some(found) = strip_drive(text) {
        return found;
    }
    match text.strip_prefix('/') {
        Some(rest) => (Some(Anchor::Root), rest),
        None => (None, text),
    }
}

fn at_first(text: &str, anchor: impl FnOnce(String) -> Anchor) -> (Option<Anchor>, &str) {
    let (name, rest) = text.split_once('/').unwrap_or((text, ""));
    (Some(anchor(name.to_owned())), rest)
}

fn strip_drive(text: &str) -> Option<(Option<Anchor>, &str)> {
    let letter = text.chars().next().filter(char::is_ascii_alphabetic)?;
    let rest = text[1..].strip_prefix(':')?;
    // Without a slash, from whatever directory somebody had chosen there.
    let anchor = match rest.starts_with('/') {
        true => Anchor::Drive(letter.to_ascii_uppercase()),
        false => Anchor::Elsewhere,
    };
    Some((Some(anchor), rest))
}

fn strip_ignoring_case<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    let (start, rest) = text.split_at_checked(prefix.len())?;
    start.eq_ignore_ascii_case(prefix).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart() {
        let up = |up| Anchor::Directory { up };
        let nas = || Anchor::Server("nas".to_owned());
        for (text, anchor, names) in [
            (r".\base.vhd", up(0), &["base.vhd"][..]),
            ("base.vhd", up(0), &["base.vhd"]),
            (r"..\..\a b\.\c\..\base.vhd", up(2), &["a b", "base.vhd"]),
            ("./a//base.vhd", up(0), &["a", "base.vhd"]),
            (r"a\..\..\base.vhd", up(1), &["base.vhd"]),
            (
                "/srv/disks/base.vhd",
                Anchor::Root,
                &["srv", "disks", "base.vhd"],
            ),
            (r"\srv\base.vhd", Anchor::Root, &["srv", "base.vhd"]),
            ("/../../etc/shadow", Anchor::Root, &["etc", "shadow"]),
            (
                r"D:\VMs\base.vhdx",
                Anchor::Drive('D'),
                &["VMs", "base.vhdx"],
            ),
            ("d:base.vhdx", Anchor::Elsewhere, &["base.vhdx"]),
            (
                r"\\?\d:\VMs\base.vhdx",
                Anchor::Drive('D'),
                &["VMs", "base.vhdx"],
            ),
            (
                r"\\?\volume{0a-1b}\VMs\base.vhdx",
                Anchor::Volume("volume{0a-1b}".to_owned()),
                &["VMs", "base.vhdx"],
            ),
            (r"\\nas\vms\base.vhdx", nas(), &["vms", "base.vhdx"]),
            (r"\\?\UNC\nas\vms\base.vhdx", nas(), &["vms", "base.vhdx"]),
        ] {
            let path = ForeignPath::parse(text).unwrap();
            assert_eq!(
                (path.anchor, &path.names[..]),
                (
                    anchor,
                    &names
                        .iter()
                        .map(|name| (*name).to_owned())
                        .collect::<Vec<_>>()[..]
                ),
                "{text}"
            );
        }
    }

    #[test]
    fn what_names_nothing_is_no_path() {
        let endless = "a/".repeat(100_000);
        let climbing = "../".repeat(100_000) + "a";
        for text in [
            "",
            ".",
            r".\",
            "..",
            "/",
            r"\\?\",
            r"\\server",
            "D:",
            "a\0b",
            &endless,
            &climbing,
        ] {
            assert_eq!(ForeignPath::parse(text), None, "{:.20}", text);
        }
    }
}
