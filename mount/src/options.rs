//! Sizes, durations and mount options as people write them.

use std::path::PathBuf;
use std::time::Duration;

/// One of the comma-separated options behind `-o`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MountOption {
    /// `ro`, `rw`.
    ReadOnly(bool),
    /// `allow_other`.
    AllowOther,
    /// `idle-after=TIME`.
    IdleAfter(Duration),
    /// `quiet-time=TIME`.
    QuietTime(Duration),
    /// `busy-share=PERCENT`.
    BusyShare(u8),
    /// `low-space=SIZE|PERCENT%`.
    LowSpace(Share),
    /// `min-reclaim=SIZE`.
    MinReclaim(u64),
    /// `no-compact`.
    NoCompact,
    /// `punch-holes=on|off`.
    PunchHoles(bool),
    /// `fs-aware=auto|off`.
    FsAware(bool),
    /// `no-children`.
    NoChildren,
    /// `threads=N`.
    Threads(u16),
    /// `parent-dir=DIR`.
    ParentDir(PathBuf),
    /// `log-file=FILE`.
    LogFile(PathBuf),
    /// For others than us: mount(8) itself, systemd, or implied anyway.
    Ignored,
}

/// Options that every mount helper gets and that mean nothing to us. The kernel never lets set-id
/// programs and device nodes of this mount work, whatever they say.
const GENERIC: [&str; 28] = [
    "async",
    "atime",
    "auto",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "group",
    "lazytime",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "noexec",
    "nofail",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nouser",
    "owner",
    "relatime",
    "strictatime",
    "suid",
    "sync",
    "user",
    "users",
    "_netdev",
];

/// Reads one mount option.
pub(crate) fn mount_option(text: &str) -> Result<MountOption, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    let needed = || value.ok_or_else(|| format!("{name} needs a value"));
    // fstab habits: both spellings.
    let option = match name.replace('_', "-").as_str() {
        "ro" | "read-only" => MountOption::ReadOnly(true),
        "rw" => MountOption::ReadOnly(false),
        "allow-other" => MountOption::AllowOther,
        "idle-after" => MountOption::IdleAfter(duration(needed()?)?),
        "quiet-time" => MountOption::QuietTime(duration(needed()?)?),
        "busy-share" => MountOption::BusyShare(percent(needed()?)?),
        "low-space" => MountOption::LowSpace(share(needed()?)?),
        "min-reclaim" => MountOption::MinReclaim(size(needed()?)?),
        "no-compact" | "nocompact" => MountOption::NoCompact,
        "no-children" => MountOption::NoChildren,
        "fs-aware" => match needed()? {
            "auto" => MountOption::FsAware(true),
            "off" => MountOption::FsAware(false),
            other => return Err(format!("fs-aware is auto or off, not {other:?}")),
        },
        "punch-holes" => match needed()? {
            "on" => MountOption::PunchHoles(true),
            "off" => MountOption::PunchHoles(false),
            other => return Err(format!("punch-holes is on or off, not {other:?}")),
        },
        "threads" => match needed()?.parse() {
            Ok(threads @ 1..=256) => MountOption::Threads(threads),
            _ => return Err("threads is a number from 1 to 256".to_owned()),
        },
        "parent-dir" => MountOption::ParentDir(needed()?.into()),
        "log-file" => MountOption::LogFile(needed()?.into()),
        // Set for every mount.
        "default-permissions" => MountOption::Ignored,
        _ if text.is_empty() || GENERIC.contains(&name) => MountOption::Ignored,
        _ if name.starts_with("x-") || matches!(name, "comment" | "subtype" | "fsname") => {
            MountOption::Ignored
        }
        _ => return Err(format!("unknown mount option {name:?}")),
    };
    Ok(option)
}

/// A part of something: so many bytes, or so many hundredths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// Bytes.
    Bytes(u64),
    /// Hundredths, at most 100.
    Percent(u8),
}

impl Share {
    /// Bytes that it is of `whole`.
    pub(crate) fn of(self, whole: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            // Divided first: sizes are far above 100, and never overflow so.
            Self::Percent(percent) => whole / 100 * u64::from(percent),
        }
    }
}

/// Reads a size, or a percentage: `100M`, `10%`.
pub(crate) fn share(text: &str) -> Result<Share, String> {
    match text.strip_suffix('%') {
        None if text
            .parse()
            .is_ok_and(|number: u64| (1..=100).contains(&number)) =>
        {
            Err(format!(
                "{text} is {text} bytes or {text} percent: write {text}B or {text}%"
            ))
        }
        None => size(text).map(Share::Bytes),
        Some(_) => percent(text).map(Share::Percent),
    }
}

/// Reads a percentage, with or without its sign: `5%`, `0`.
pub(crate) fn percent(text: &str) -> Result<u8, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim_end();
    match number.parse() {
        Ok(percent @ 0..=100) => Ok(percent),
        _ => Err(format!("{text:?} is no percentage from 0% to 100%")),
    }
}

/// Reads a size in bytes: `4096`, `16M`, `16MiB`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = split_unit(text);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(format!("{unit:?} is no unit of size: use K, M, G or T")),
    };
    let count: u64 = digits.parse().map_err(|_| format!("{text:?} is no size"))?;
    count
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text} is too large"))
}

/// Reads the size of a disk's sectors.
pub(crate) fn sector_size(text: &str) -> Result<u32, String> {
    match size(text)? {
        512 => Ok(512),
        4096 => Ok(4096),
        _ => Err("sectors have 512 or 4096 bytes".to_owned()),
    }
}

/// Reads a duration: `500ms`, `5s`, `2m`, `1h`; seconds without a unit.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let (digits, unit) = split_unit(text);
    let milliseconds: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("{unit:?} is no unit of time: use ms, s, m or h")),
    };
    let count: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is no duration"))?;
    let total = count
        .checked_mul(milliseconds)
        .ok_or_else(|| format!("{text} is too long"))?;
    Ok(Duration::from_millis(total))
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    (digits, unit.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares() {
        assert_eq!(share("10%"), Ok(Share::Percent(10)));
        assert_eq!(share("16M"), Ok(Share::Bytes(16 << 20)));
        assert_eq!(share("0"), Ok(Share::Bytes(0)));
        assert_eq!(share("10B"), Ok(Share::Bytes(10)));
        for text in ["101%", "-1%", "%", "1.5%", "1M%", "10"] {
            assert!(share(text).is_err(), "{text}");
        }
        assert_eq!((percent("5"), percent("0%")), (Ok(5), Ok(0)));
        assert!(percent("5M").is_err() && percent("101").is_err());
        assert_eq!(Share::Percent(25).of(u64::MAX), u64::MAX / 100 * 25);
        assert_eq!(Share::Bytes(7).of(1 << 30), 7);
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4K", 4096),
            ("4k", 4096),
            ("16MiB", 16 << 20),
            ("2 GiB", 2 << 30),
            ("1T", 1 << 40),
            ("7b", 7),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "K",
            "-1",
            "1.5G",
            "1KB",
            "1 X",
            "99999999999999T",
            "0x10",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in [
            ("5s", 5000),
            ("500ms", 500),
            ("2m", 120_000),
            ("1h", 3_600_000),
            ("3", 3000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "5d", "-5s", "1.5s", "99999999999999999h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn mount_options() {
        assert_eq!(mount_option("ro"), Ok(MountOption::ReadOnly(true)));
        assert_eq!(
            mount_option("idle_after=10s"),
            Ok(MountOption::IdleAfter(Duration::from_secs(10)))
        );
        assert_eq!(
            mount_option("quiet-time=2m"),
            Ok(MountOption::QuietTime(Duration::from_secs(120)))
        );
        assert_eq!(
            mount_option("busy-share=10%"),
            Ok(MountOption::BusyShare(10))
        );
        assert_eq!(
            mount_option("low_space=20G"),
            Ok(MountOption::LowSpace(Share::Bytes(20 << 30)))
        );
        for ignored in [
            "nofail",
            "x-systemd.automount",
            "comment=a",
            "_netdev",
            "",
            "default_permissions",
        ] {
            assert_eq!(mount_option(ignored), Ok(MountOption::Ignored), "{ignored}");
        }
        for wrong in [
            "allow_root",
            "punch-holes=maybe",
            "fs-aware=on",
            "idle-after",
            "threads=0",
            "busy-share=150%",
            "low-space=half",
            "Ro",
        ] {
            assert!(mount_option(wrong).is_err(), "{wrong}");
        }
    }
}
