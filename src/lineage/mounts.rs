//! What is mounted below a directory, and whether it may be looked into.
//!
//! Looking into a file system waits for whoever serves it. Where that is a vhdfs mount, perhaps our own,
//! at the bottom (a guest's file system on a loop device on a disk that is shown), a thread of ours that
//! waits there keeps the mount alive that it waits for, even through `kill -9`. Such file systems are told
//! by the table of mounts and by what the kernel says of block devices; they are not touched at all.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use crate::storage::host::pin::Pin;

/// What is to be done about a mount.
#[cfg_attr(
    not(target_os = "linux"),
    expect(dead_code, reason = "only Linux tells what is mounted")
)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Nobody has disk files there: the kernel's own, and what vhdfs shows.
    Empty,
    /// Somebody who may be kept waiting may look into it.
    Foreign,
    /// Must not be touched.
    Closed,
}

/// A file system below a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// Tells it from another one at that place.
    pub(super) id: u64,
    pub(super) access: Access,
}

/// The mounts below a directory, by their path below it.
#[derive(Debug, Default)]
pub(super) struct Mounts(HashMap<PathBuf, Mount>);

impl Mounts {
    /// What is mounted at that path. Of several the one on top, unless one of them must not be touched.
    pub(super) fn at(&self, path: &Path) -> Option<Mount> {
        self.0.get(path).copied()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the directory at `path` may be looked into by somebody whom a vhdfs mount may be waiting for.
    fn allow(&self, path: &Path) -> bool {
        let mounts = path.ancestors().filter_map(|place| self.at(place));
        { mounts }.all(|mount| mount.access == Access::Foreign)
    }

    /// What is mounted below `directory`, absolute and without symbolic links. Where the host does not say:
    /// nothing, and who comes upon a mount all the same does not enter it.
    #[cfg(target_os = "linux")]
    pub(super) fn below(directory: &Path) -> Self {
        let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
        linux::Table::parse(&table, Path::new("/sys")).below(directory)
    }

    /// Elsewhere what is mounted is reached by a link, which is not followed.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn below(_: &Path) -> Self {
        Self::default()
    }
}

/// Whether a server may go to the directory at `path` below `top`, where another file system is mounted on the
/// way: not where it may be the one that has to answer.
pub(crate) fn may_serve(top: &Pin, path: &Path) -> io::Result<bool> {
    Ok(Mounts::below(&top.real_path()?).allow(path))
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::HashMap;
    use std::ffi::{OsStr, OsString};
    use std::fs;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use super::super::names;
    use super::{Access, Mount, Mounts};

    /// The type of our own mounts.
    const OURS: &str = "fuse.vhdfs";

    /// Types of file systems that hold no files of people's. The last shows files that are elsewhere, too.
    const KERNELS: [&str; 22] = [
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "devtmpfs",
        "efivarfs",
        "fusectl",
        "hugetlbfs",
        "mqueue",
        "nsfs",
        "proc",
        "pstore",
        "rpc_pipefs",
        "securityfs",
        "selinuxfs",
        "sysfs",
        "tracefs",
        "fuse.lxcfs",
        "fuse.portal",
    ];

    /// How many file systems and devices may lie on each other.
    const MOST_LEVELS: usize = 16;

    #[derive(Debug)]
    struct Entry {
        id: u64,
        /// `MAJOR:MINOR`.
        device: String,
        mount_point: PathBuf,
        file_system: String,
        source: PathBuf,
        options: Vec<u8>,
    }

    pub(super) struct Table<'a> {
        entries: Vec<Entry>,
        /// Where the kernel tells of its devices.
        sys: &'a Path,
    }

    impl<'a> Table<'a> {
        pub(super) fn parse(text: &[u8], sys: &'a Path) -> Self {
            let lines = text.split(|byte| *byte == b'\n');
            Self {
                entries: lines.filter_map(parse).collect(),
                sys,
            }
        }

        pub(super) fn below(&self, directory: &Path) -> Mounts {
            let mut below: HashMap<PathBuf, Mount> = HashMap::new();
            for entry in &self.entries {
                let Ok(path) = entry.mount_point.strip_prefix(directory) else {
                    continue;
                };
                let (id, access) = (entry.id, self.access(entry));
                let known = below.entry(path.to_owned());
                let mount = known.or_insert(Mount { id, access });
                if mount.access != Access::Closed {
                    *mount = Mount { id, access };
                }
            }
            below.remove(Path::new(""));
            Mounts(below)
        }

        fn access(&self, entry: &Entry) -> Access {
            match entry.file_system.as_str() {
                OURS => Access::Empty,
                kernels if KERNELS.contains(&kernels) => Access::Empty,
                // Looking into it makes it mount what somebody else has to answer for.
                "autofs" => Access::Closed,
                _ if self.is_on_vhdfs(entry, 0) => Access::Closed,
                _ => Access::Foreign,
            }
        }

        /// Whether what is mounted there needs a vhdfs mount to answer, or may.
        fn is_on_vhdfs(&self, entry: &Entry, level: usize) -> bool {
            if entry.file_system == OURS || level > MOST_LEVELS {
                return true;
            }
            let block_device = self.block_device(&entry.source);
            let is_device = entry.source.starts_with("/dev");
            let is_programs = entry.file_system.starts_with("fuse");
            // It has no device number of its own, and nobody can tell what it lies on.
            if is_device && block_device.is_none() && !is_programs && entry.device.starts_with("0:")
            {
                return true;
            }
            let mut devices = vec![entry.device.clone()];
            if let Some(name) = &block_device {
                devices.extend(self.number_of(name));
                devices.extend(self.devices_beside(name));
            }
            let mut paths = layers(&entry.options);
            let is_file = block_device.is_none() && (is_programs || !is_device);
            if is_file && entry.source.is_absolute() {
                paths.push(entry.source.clone());
            }
            (devices.iter()).any(|device| self.is_device_on_vhdfs(device, level + 1))
                || (paths.iter()).any(|path| self.is_path_on_vhdfs(path, level + 1))
        }

        /// The kernel's name for the block device that `source` is. By the words: users choose what a FUSE mount
        /// says there, and a path may lead through links to a file system that does not answer.
        fn block_device(&self, source: &Path) -> Option<OsString> {
            let known = self.sys.join("class/block");
            let name = source.strip_prefix("/dev").ok()?.as_os_str();
            if let Ok(mapped) = source.strip_prefix("/dev/mapper") {
                let is_it = |name: &OsString| {
                    let said = fs::read(known.join(name).join("dm/name"));
                    said.is_ok_and(|said| said.trim_ascii_end() == mapped.as_os_str().as_bytes())
                };
                return listed(&known).into_iter().find(is_it);
            }
            // As the kernel writes a name of several parts.
            let name = name.as_bytes().iter().map(|byte| match byte {
                b'/' => b'!',
                byte => *byte,
            });
            let name = OsString::from_vec(name.collect());
            known.join(&name).join("dev").exists().then_some(name)
        }

        /// The devices of a btrfs that has this one.
        fn devices_beside(&self, name: &OsStr) -> Vec<String> {
            let pools = listed(&self.sys.join("fs/btrfs")).into_iter();
            let own = pools
                .map(|pool| self.sys.join("fs/btrfs").join(pool).join("devices"))
                .find(|devices| devices.join(name).exists());
            let beside = own.map_or_else(Vec::new, |devices| listed(&devices));
            (beside.iter())
                .filter_map(|name| self.number_of(name))
                .collect()
        }

        fn number_of(&self, name: &OsStr) -> Option<String> {
            let file = self.sys.join("class/block").join(name).join("dev");
            Some(fs::read_to_string(file).ok()?.trim().to_owned())
        }

        /// Whether that block device needs a vhdfs mount to answer, or may.
        fn is_device_on_vhdfs(&self, device: &str, level: usize) -> bool {
            let place = self.sys.join("dev/block").join(device);
            // What is no block device has no place there.
            let Ok(place) = fs::canonicalize(place) else {
                return false;
            };
            if level > MOST_LEVELS {
                return true;
            }
            let whole = match place.join("partition").exists() {
                true => place.parent().unwrap_or(&place),
                false => &place,
            };
            // Programs serve these, of which nobody can tell what they need.
            let name = whole.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("nbd") || name.starts_with("ublk") {
                return true;
            }
            let lower = listed(&whole.join("slaves")).into_iter();
            let mut lower = lower.filter_map(|name| self.number_of(&name));
            backing_file(whole).is_some_and(|file| self.is_path_on_vhdfs(&file, level + 1))
                || lower.any(|device| self.is_device_on_vhdfs(&device, level + 1))
        }

        /// Whether the file at `path` needs a vhdfs mount to answer, or may. By the words: it is not touched.
        fn is_path_on_vhdfs(&self, path: &Path, level: usize) -> bool {
            // One that is mounted where we do not see it shows its files under such names, too.
            let is_shown = path.extension().is_some_and(|found| found == "raw")
                && path.file_stem().is_some_and(names::is_disk_name);
            let there = (self.entries.iter()).filter(|entry| path.starts_with(&entry.mount_point));
            let nearest = there.max_by_key(|entry| entry.mount_point.as_os_str().len());
            is_shown || nearest.is_some_and(|entry| self.is_on_vhdfs(entry, level))
        }
    }

    /// The file that a loop device shows.
    fn backing_file(device: &Path) -> Option<PathBuf> {
        let mut text = fs::read(device.join("loop/backing_file")).ok()?;
        text.truncate(text.trim_ascii_end().len());
        let gone = b" (deleted)";
        if text.ends_with(gone) {
            text.truncate(text.len() - gone.len());
        }
        Some(OsString::from_vec(text).into())
    }

    /// The directories that an overlay lies over.
    fn layers(options: &[u8]) -> Vec<PathBuf> {
        let options = options.split(|byte| *byte == b',');
        let directories = options.filter_map(|option| {
            let kinds: [&[u8]; 3] = [b"lowerdir", b"upperdir", b"lowerdir+"];
            let at = option.iter().position(|byte| *byte == b'=')?;
            kinds.contains(&&option[..at]).then(|| &option[at + 1..])
        });
        let paths = directories.flat_map(|paths| paths.split(|byte| *byte == b':'));
        { paths }
            .map(|path| PathBuf::from(OsString::from_vec(path.to_owned())))
            .filter(|path| path.is_absolute())
            .collect()
    }

    fn listed(directory: &Path) -> Vec<OsString> {
        let entries = fs::read_dir(directory).into_iter().flatten();
        entries
            .filter_map(|entry| Some(entry.ok()?.file_name()))
            .collect()
    }

    /// Reads a line: `36 35 98:0 /root /mount/point options optional... - type source options`.
    fn parse(line: &[u8]) -> Option<Entry> {
        let mut fields = line.split(|byte| *byte == b' ');
        let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
        let path = |field: &[u8]| PathBuf::from(OsString::from_vec(unescaped(field)));
        let id = text(fields.next()?).parse().ok()?;
        let device = fields.nth(1)?;
        let mount_point = fields.nth(1)?;
        let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
        Some(Entry {
            id,
            device: text(device),
            mount_point: path(mount_point),
            file_system: text(rest.next()?),
            source: path(rest.next()?),
            options: unescaped(rest.next().unwrap_or_default()),
        })
    }

    /// Undoes the table's escapes: `\040` for a space, and so on.
    fn unescaped(text: &[u8]) -> Vec<u8> {
        let mut plain = Vec::with_capacity(text.len());
        let mut rest = text;
        while let Some((&first, after)) = rest.split_first() {
            let digits = after.get(..3).filter(|_| first == b'\\');
            let octal = digits.and_then(|digits| std::str::from_utf8(digits).ok());
            match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
                Some(byte) => {
                    plain.push(byte);
                    rest = &after[3..];
                }
                None => {
                    plain.push(first);
                    rest = after;
                }
            }
        }
        plain
    }

    #[cfg(test)]
    mod tests {
        use std::os::unix::fs::symlink;

        use super::*;

        /// A directory of devices: a disk with a partition, loop devices over files here and on our mount, and
        /// a mapped device over one of them.
        fn devices() -> tempfile::TempDir {
            let sys = tempfile::tempdir().unwrap();
            let at = |path: &str| sys.path().join(path);
            for device in [
                "vda",
                "vda/vda1",
                "loop0",
                "loop1",
                "loop1/loop1p1",
                "loop2",
                "loop3",
                "dm-0",
                "nbd3",
            ] {
                fs::create_dir_all(at("devices").join(device)).unwrap();
            }
            fs::create_dir_all(at("dev/block")).unwrap();
            for (number, device) in [
                ("8:0", "vda"),
                ("8:1", "vda/vda1"),
                ("7:0", "loop0"),
                ("7:1", "loop1"),
                ("259:0", "loop1/loop1p1"),
                ("7:2", "loop2"),
                ("7:3", "loop3"),
                ("253:0", "dm-0"),
                ("43:3", "nbd3"),
            ] {
                symlink(at("devices").join(device), at("dev/block").join(number)).unwrap();
                let name = Path::new(device).file_name().unwrap();
                let class = at("class/block").join(name);
                fs::create_dir_all(&class).unwrap();
                fs::write(class.join("dev"), format!("{number}\n")).unwrap();
            }
            for partition in ["vda/vda1", "loop1/loop1p1"] {
                fs::write(at("devices").join(partition).join("partition"), "1\n").unwrap();
            }
            for (device, file) in [
                ("loop0", "/srv/plain.img\n"),
                ("loop1", "/mnt/shown/a disk.vhdx.raw (deleted)\n"),
                ("loop2", "/guest/inner.img\n"),
            ] {
                fs::create_dir_all(at("devices").join(device).join("loop")).unwrap();
                fs::write(at("devices").join(device).join("loop/backing_file"), file).unwrap();
            }
            fs::create_dir_all(at("devices/dm-0/slaves/loop1")).unwrap();
            fs::create_dir_all(at("class/block/dm-0/dm")).unwrap();
            fs::write(at("class/block/dm-0/dm/name"), "guest-disk\n").unwrap();
            // What a device that every machine has would be, if it were asked.
            symlink(at("devices/loop1"), at("dev/block/1:3")).unwrap();
            fs::create_dir_all(at("fs/btrfs/1234/devices/loop3")).unwrap();
            fs::create_dir_all(at("fs/btrfs/1234/devices/loop1")).unwrap();
            sys
        }

        #[test]
        fn file_systems_on_a_vhdfs_mount_are_told_from_others() {
            let sys = devices();
            let table = b"1 0 8:1 / / rw - ext4 /dev/vda1 rw
2 1 0:50 / /mnt/shown rw shared:7 - fuse.vhdfs /srv/disks rw
3 1 0:21 / /srv/disks/proc rw - proc proc rw
4 1 0:60 / /srv/disks/shown\\040again rw - fuse.vhdfs /srv/disks rw
5 1 8:0 / /srv/disks/second rw - xfs /dev/vda rw
6 1 7:0 / /srv/disks/image rw - ext4 /dev/loop0 rw
7 1 259:0 / /guest rw - ext4 /dev/loop1p1 rw
8 1 259:0 /sub /srv/disks/guest rw - ext4 /dev/loop1p1 rw
9 1 7:2 / /srv/disks/nested rw - ext4 /dev/loop2 rw
10 1 253:0 / /srv/disks/mapped rw - ext4 /dev/mapper/x rw
11 1 0:70 / /srv/disks/pool rw - btrfs /dev/loop3 rw
12 1 0:71 / /srv/disks/overlay rw - overlay overlay rw,lowerdir=/srv/a:/guest/b,upperdir=/srv/c
13 1 0:72 / /srv/disks/plain rw - overlay overlay rw,lowerdir=/srv/a,upperdir=/srv/c
14 1 0:73 / /srv/disks/nas rw - nfs4 nas:/export rw
15 1 0:74 / /srv/disks/user rw - fuse.fuse2fs /mnt/shown/a.vhd.raw rw
16 1 0:75 / /srv/disks/auto rw - autofs auto rw
17 1 43:3 / /srv/disks/served rw - ext4 /dev/nbd3 rw
18 1 0:76 / /srv/disks/ssh rw - fuse.sshfs host:/x rw
19 1 0:77 / /srv/disks/mapped\\040pool rw - btrfs /dev/mapper/guest-disk rw
20 1 0:78 / /srv/disks/linked\\040pool rw - btrfs /dev/disk/by-id/x rw
21 1 0:79 / /srv/disks/plain\\040pool rw - btrfs /dev/vda1 rw
22 1 0:80 / /srv/disks/on\\040loop rw - fuse.fuse2fs /dev/loop1 rw
23 1 0:82 / /srv/disks/in\\040dev rw - fuse.fuse2fs /dev/shm/a.vhd.raw rw
24 1 0:81 / /srv/disks/named\\040by\\040users rw - fuse.sshfs /dev/null rw
25 1 8:1 /elsewhere /srv/disks rw - ext4 /dev/vda1 rw
";
            let mounts = Table::parse(table, sys.path()).below(Path::new("/srv/disks"));
            for (path, access) in [
                ("proc", Access::Empty),
                ("shown again", Access::Empty),
                ("second", Access::Foreign),
                ("image", Access::Foreign),
                ("guest", Access::Closed),
                ("nested", Access::Closed),
                ("mapped", Access::Closed),
                ("pool", Access::Closed),
                ("overlay", Access::Closed),
                ("plain", Access::Foreign),
                ("nas", Access::Foreign),
                ("user", Access::Closed),
                ("auto", Access::Closed),
                ("served", Access::Closed),
                ("ssh", Access::Foreign),
                ("mapped pool", Access::Closed),
                ("linked pool", Access::Closed),
                ("plain pool", Access::Foreign),
                ("on loop", Access::Closed),
                ("in dev", Access::Closed),
                ("named by users", Access::Foreign),
            ] {
                let found = mounts.at(Path::new(path)).map(|mount| mount.access);
                assert_eq!(found, Some(access), "{path}");
            }
            for (path, may) in [
                ("nas/a/b", true),
                ("guest/a", false),
                ("guest", false),
                ("shown again", false),
                ("sub/a", true),
            ] {
                assert_eq!(mounts.allow(Path::new(path)), may, "{path}");
            }
            assert_eq!(
                (
                    mounts.0.len(),
                    mounts.at(Path::new("")),
                    mounts.at(Path::new("x"))
                ),
                (21, None, None)
            );
        }
    }
}
