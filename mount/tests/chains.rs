//! Differencing disks on the command line and in a mount.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{
    Mount, NOBODY, as_user, copy_program, create, errno, eventually, exit_code, has, json, run,
    stderr,
};
use fuser::{FileHandle, Filesystem, INodeNo, OpenFlags, ReplyAttr, ReplyOpen, Request};
use parking_lot::Mutex;
use rustix::io::Errno;
use serde_json::{Value, json};
use vhdfs::disk::{Disk, HostParents, OpenOptions};

const FORMATS: [&str; 2] = ["vhd", "vhdx"];

/// Makes a child of `parent`.
fn create_child(path: &Path, parent: &Path) {
    create(path, &["--parent", parent.to_str().unwrap()]);
}

/// Writes to a disk whose parents lie beside it.
fn write(path: &Path, data: &[u8], offset: u64) {
    let disk = Disk::open(path, &OpenOptions::default()).unwrap();
    disk.write_at(data, offset).unwrap();
    disk.close().unwrap();
}

fn read(path: &Path, offset: u64, more: &[PathBuf]) -> [u8; 4] {
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let disk = Disk::open_with(path, &options, &HostParents::beside(path, more)).unwrap();
    let mut bytes = [0; 4];
    disk.read_at(&mut bytes, offset).unwrap();
    bytes
}

fn info(arguments: &[&str], path: &Path) -> Value {
    let all = ["info", "--json"].iter().chain(arguments).map(OsStr::new);
    json(&run(all.chain([path.as_os_str()])))
}

fn command(arguments: &[&str], path: &Path) -> std::process::Output {
    let all = arguments.iter().map(OsStr::new);
    run(all.chain([path.as_os_str()]))
}

#[test]
fn chains_are_made_and_shown() {
    for format in FORMATS {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().canonicalize().unwrap();
        let at = |name: &str| top.join(format!("{name}.{format}"));
        fs::create_dir(top.join("sub")).unwrap();
        create(&at("base"), &["--size", "64M"]);
        write(&at("base"), b"base", 5 << 20);
        create(
            &at("sub/one"),
            &[
                "--type",
                "differencing",
                "--parent",
                at("base").to_str().unwrap(),
            ],
        );
        create_child(&at("two"), &at("sub/one"));
        // Its parents are found with leave for the parent directory alone.
        assert_eq!(read(&at("two"), 5 << 20, &[]), *b"base");
        write(&at("two"), b"two.", 9 << 20);
        assert_eq!(read(&at("two"), 9 << 20, &[]), *b"two.");
        assert_eq!(
            read(&at("sub/one"), 9 << 20, std::slice::from_ref(&top)),
            [0; 4]
        );

        let two = info(&[], &at("two"));
        assert_eq!(
            (&two["type"], &two["format"]),
            (&json!("differencing"), &json!(format))
        );
        assert_eq!(two["virtual_size"], 64 << 20);
        let base = info(&[], &at("base"));
        let parents = two["parents"].as_array().unwrap();
        let shown: Vec<_> = parents
            .iter()
            .map(|parent| parent["file"].clone())
            .collect();
        assert_eq!(
            shown,
            [
                at("sub/one").to_str().unwrap(),
                at("base").to_str().unwrap()
            ]
        );
        assert_eq!(parents[1]["type"], "dynamic");
        assert_eq!(parents[1]["identity"], base["identity"]);
        assert_eq!(base["children"], json!([at("sub/one")]));
        let text = String::from_utf8(command(&["info"], &at("base")).stdout).unwrap();
        assert!(text.contains("1 child here"), "{text}");
        let text = String::from_utf8(command(&["info"], &at("two")).stdout).unwrap();
        assert!(text.contains("one.") && text.contains("dynamic"), "{text}");
        for name in ["two", "base"] {
            assert_eq!(exit_code(&command(&["check"], &at(name))), 0, "{name}");
            assert_eq!(
                exit_code(&command(&["map", "--ascii"], &at(name))),
                0,
                "{name}"
            );
        }
    }
}

#[test]
fn parents_elsewhere_need_leave() {
    for format in FORMATS {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(format!("{name}.{format}"));
        for directory in ["bases", "vms"] {
            fs::create_dir(root.path().join(directory)).unwrap();
        }
        create(&at("bases/base"), &["--size", "64M"]);
        let base = at("bases/base");
        let child = at("vms/child");
        let made = command(&["create", "--parent", base.to_str().unwrap()], &child);
        assert_eq!(exit_code(&made), 0);
        assert!(stderr(&made).contains("--parent-dir"), "{}", stderr(&made));

        let alone = info(&[], &child);
        assert_eq!(alone["type"], "differencing");
        assert_eq!(alone["parents"], json!([]));
        let error = alone["parent_error"].as_str().unwrap();
        assert!(
            error.contains("--parent-dir") && error.contains("bases"),
            "{error}"
        );
        let allow = root.path().join("bases");
        let allow = ["--parent-dir", allow.to_str().unwrap()];
        assert_eq!(info(&allow, &child)["parents"].as_array().unwrap().len(), 1);
        for name in ["info", "check", "compact", "map"] {
            let refused = command(&[name], &child);
            assert_eq!(exit_code(&refused), 1, "{name}");
            let allowed = command(&[name, allow[0], allow[1]], &child);
            assert_eq!(exit_code(&allowed), 0, "{name}: {}", stderr(&allowed));
        }
        // A link does not help.
        symlink("../bases", root.path().join("vms/bases")).unwrap();
        let refused = command(&["info"], &child);
        assert_eq!(exit_code(&refused), 1);

        let away = at("bases/away");
        fs::rename(&base, &away).unwrap();
        create(&base, &["--size", "64M"]);
        let wrong = info(&allow, &child);
        let error = wrong["parent_error"].as_str().unwrap();
        let id = info(&[], &base)["identity"].as_str().unwrap().to_owned();
        assert!(error.contains(&id), "{error}");
    }
}

#[test]
fn impossible_children_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    create(&at("base.vhd"), &["--size", "8M"]);
    create(&at("base.vhdx"), &["--size", "8M", "--sector-size", "4096"]);
    let made = info(&[], &at("base.vhdx"));
    assert_eq!(
        (&made["sector_size"], &made["format"]),
        (&json!(4096), &json!("vhdx"))
    );
    let vhd = at("base.vhd");
    let vhdx = at("base.vhdx");
    let (vhd, vhdx) = (vhd.to_str().unwrap(), vhdx.to_str().unwrap());
    // What is wrong with the arguments themselves is wrong usage; what the parent is, is not.
    for (arguments, file, reason) in [
        (&["--parent", vhd][..], "child.vhdx", "name it .vhd"),
        (
            &["--parent", vhd, "--format", "vhdx"],
            "child.img",
            "not possible",
        ),
        (&["--size", "8M", "--format", "vhdx"], "x.vhd", "name"),
        (
            &["--parent", vhdx, "--sector-size", "512"],
            "x.vhdx",
            "4096",
        ),
        (&["--parent", vhd, "--type", "dynamic"], "x.vhd", "--parent"),
        (&["--parent", "/no/such.vhd"], "x.vhd", "no/such.vhd"),
        (&["--size", "8M", "--block-size", "512K"], "x.vhdx", "1 MiB"),
    ] {
        let all: Vec<_> = ["create"].iter().chain(arguments).copied().collect();
        let refused = command(&all, &at(file));
        let by_parent = ["name it .vhd", "not possible", "no/such.vhd"].contains(&reason);
        assert_eq!(
            exit_code(&refused),
            if by_parent { 1 } else { 2 },
            "{arguments:?}: {}",
            stderr(&refused)
        );
        assert!(
            stderr(&refused).contains(reason),
            "{arguments:?}: {}",
            stderr(&refused)
        );
        assert!(!at(file).exists());
    }
    // Without an extension that says more, the parent decides.
    create_child(&at("child.img"), &at("base.vhdx"));
    let child = info(&[], &at("child.img"));
    assert_eq!(
        (&child["sector_size"], &child["format"]),
        (&json!(4096), &json!("vhdx"))
    );
}

#[test]
fn compacting_parents_and_children_changes_nothing_that_is_read() {
    for format in FORMATS {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(format!("{name}.{format}"));
        create(&at("base"), &["--size", "64M"]);
        let keep_zeros = OpenOptions {
            punch_holes: false,
            ..OpenOptions::default()
        };
        let disk = Disk::open(&at("base"), &keep_zeros).unwrap();
        disk.write_at(&vec![7; 4 << 20], 0).unwrap();
        disk.write_at(&vec![1; 2 << 20], 8 << 20).unwrap();
        disk.write_at(&vec![0; (2 << 20) - 4096], 0).unwrap();
        disk.write_at(&vec![0; 4096], (2 << 20) - 4096).unwrap();
        drop(disk);
        create_child(&at("child"), &at("base"));
        // The same as the parent has.
        write(&at("child"), &vec![1; 2 << 20], 8 << 20);
        write(&at("child"), b"own!", 20 << 20);
        let content =
            |path: &Path| -> Vec<[u8; 4]> { (0..32).map(|n| read(path, n << 21, &[])).collect() };
        let before = content(&at("child"));
        let id = info(&[], &at("base"))["identity"].clone();
        let compacted = command(&["compact", "--json"], &at("base"));
        assert_eq!(exit_code(&compacted), 0, "{}", stderr(&compacted));
        let children = json(&compacted)["children"].clone();
        assert_eq!(children, json!([at("child").canonicalize().unwrap()]));
        let text = String::from_utf8(command(&["compact"], &at("base")).stdout).unwrap();
        assert!(text.contains("parent of 1 child"), "{text}");
        assert_eq!(info(&[], &at("base"))["identity"], id);
        assert!(content(&at("child")) == before, "{format}");

        let blocks = || {
            info(&[], &at("child"))["blocks_allocated"]
                .as_u64()
                .unwrap()
        };
        assert_eq!(blocks(), 2);
        let kept = json(&command(
            &["compact", "--json", "--keep-identical"],
            &at("child"),
        ));
        assert_eq!((&kept["blocks_dropped"], blocks()), (&json!(0), 2));
        let done = json(&command(&["compact", "--json"], &at("child")));
        assert_eq!((&done["blocks_dropped"], blocks()), (&json!(1), 1));
        assert!(content(&at("child")) == before, "{format}");
    }
}

#[test]
fn a_mount_shows_parents_read_only() {
    for format in FORMATS {
        let base = format!("base.{format}");
        let child = format!("sub/child.{format}");
        let mount = Mount::new(&[], |source| {
            fs::create_dir(source.join("sub")).unwrap();
            create(&source.join(&base), &["--size", "64M"]);
            write(&source.join(&base), b"base", 5 << 20);
            create_child(&source.join(&child), &source.join(&base));
        });
        let Some(mount) = mount else { return };
        let shown = |name: &str| mount.at(&format!("{name}.raw"));
        assert_eq!(mount.names(""), [format!("{base}.raw"), "sub".to_owned()]);
        let refused = errno(File::options().write(true).open(shown(&base)));
        assert_eq!(refused, Errno::ACCESS.raw_os_error());
        assert!(mount.log().contains("has children"), "{}", mount.log());
        let mode = |name: &str| fs::metadata(shown(name)).unwrap().mode();
        eventually("shown without write bits", || mode(&base) & 0o222 == 0);
        assert_ne!(mode(&child) & 0o222, 0);
        assert_eq!(fs::metadata(shown(&child)).unwrap().len(), 64 << 20);

        let file = File::options()
            .read(true)
            .write(true)
            .open(shown(&child))
            .unwrap();
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 5 << 20).unwrap();
        assert_eq!(&bytes, b"base");
        file.write_all_at(b"mine", 5 << 20).unwrap();
        file.sync_all().unwrap();
        let status = mount.status(&format!("{child}.raw"));
        assert_eq!(status["parent"], json!(base));
        let reader = File::open(shown(&base)).unwrap();
        reader.read_exact_at(&mut bytes, 5 << 20).unwrap();
        assert_eq!(&bytes, b"base");
        let status = mount.status(&format!("{base}.raw"));
        assert_eq!(
            (&status["children"], &status["read_only"]),
            (&json!([child]), &json!(true))
        );
        // Nobody else gets at the parent meanwhile.
        let refused = command(&["compact"], &mount.behind(&base));
        assert_eq!(exit_code(&refused), 1, "{}", stderr(&refused));
        drop((file, reader));
        mount.unmount();
        assert_eq!(
            read(&mount.behind(&child), 5 << 20, &[mount.source()]),
            *b"mine"
        );
    }
}

#[test]
fn a_mount_looks_for_parents_where_it_may() {
    let elsewhere = tempfile::tempdir().unwrap();
    let base = elsewhere.path().join("base.vhdx");
    create(&base, &["--size", "64M"]);
    write(&base, b"base", 5 << 20);
    let mount = Mount::new(&[], |source| {
        let child = source.join("child.vhdx");
        let made = command(&["create", "--parent", base.to_str().unwrap()], &child);
        assert_eq!(exit_code(&made), 0);
    });
    let Some(mount) = mount else { return };
    let child = mount.at("child.vhdx.raw");
    assert_eq!(errno(File::open(&child)), Errno::IO.raw_os_error());
    assert!(mount.log().contains("--parent-dir"), "{}", mount.log());
    mount.unmount();
    mount.mount(&["--parent-dir", elsewhere.path().to_str().unwrap()]);
    let file = File::open(&child).unwrap();
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 5 << 20).unwrap();
    assert_eq!(&bytes, b"base");
    let status = mount.status("child.vhdx.raw");
    assert_eq!(status["parent"], json!(base.canonicalize().unwrap()));
}

/// Something that is mounted.
struct Mounted(PathBuf);

impl Mounted {
    /// `None` for those who may not.
    fn new(arguments: &[&str], at: &Path) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can mount");
            return None;
        }
        fs::create_dir_all(at).unwrap();
        let done = Command::new("mount")
            .args(arguments)
            .arg(at)
            .output()
            .unwrap();
        if !done.status.success() {
            println!("skipped: {}", stderr(&done));
            return None;
        }
        Some(Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn open_for_writing(path: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).open(path)
}

/// How long that many opens for writing take at the same time.
fn time_to_open(mount: &Mount, name: &str, number: usize) -> Duration {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..number {
            scope.spawn(|| open_for_writing(&mount.at(name)).unwrap());
        }
    });
    begun.elapsed()
}

#[test]
fn children_on_other_file_systems_are_found() {
    let root = tempfile::tempdir().unwrap();
    let top = root.path().canonicalize().unwrap();
    let (base, child) = (
        top.join("disks/base.vhdx"),
        top.join("disks/second/child.vhdx"),
    );
    let Some(_second) = Mounted::new(&["-t", "tmpfs", "tmpfs"], &top.join("disks/second")) else {
        return;
    };
    create(&base, &["--size", "64M"]);
    create_child(&child, &base);
    fs::create_dir(top.join("links")).unwrap();
    symlink(&base, top.join("links/base.vhdx")).unwrap();
    for name in [&base, &top.join("links/base.vhdx")] {
        assert_eq!(info(&[], name)["children"], json!([child]));
    }
    let Some(mount) = Mount::new(&["--no-compact"], |source| {
        fs::remove_dir(source).unwrap();
        symlink(top.join("disks"), source).unwrap();
    }) else {
        return;
    };
    let refused = open_for_writing(&mount.at("base.vhdx.raw"));
    assert_eq!(errno(refused), Errno::ACCESS.raw_os_error());
    assert!(mount.log().contains("second/child.vhdx"));
}

#[test]
fn children_are_found_where_there_can_be_no_more_threads() {
    if !has("prlimit") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    fs::set_permissions(root.path(), Permissions::from_mode(0o755)).unwrap();
    copy_program(&at("vhdfs"));
    create(&at("base.vhd"), &["--size", "1M"]);
    // So many that several would look into them at a time.
    create_child(&at("0.vhd"), &at("base.vhd"));
    for n in 1..40 {
        fs::copy(at("0.vhd"), at(&format!("{n}.vhd"))).unwrap();
    }
    let info = || {
        let mut limited = Command::new("prlimit");
        limited.arg("--nproc=1").arg(at("vhdfs"));
        (limited.args(["info", "--json"]).arg(at("base.vhd")))
            .output()
            .unwrap()
    };
    let Some(told) = as_user(NOBODY, info) else {
        return;
    };
    let children = json(&told)["children"].as_array().map(Vec::len);
    assert_eq!(children, Some(40), "{told:?}");
}

/// A file system that answers nobody, until this is dropped: those who ask.
struct Dead(Arc<Mutex<Option<Vec<Held>>>>);

/// The same, as the kernel sees it.
struct DeadFs(Arc<Mutex<Option<Vec<Held>>>>);

#[allow(dead_code, reason = "dropping a reply is an answer: an error")]
enum Held {
    Attr(ReplyAttr),
    Open(ReplyOpen),
}

impl DeadFs {
    fn hold(&self, reply: Held) {
        if let Some(held) = &mut *self.0.lock() {
            held.push(reply);
        }
    }
}

impl Filesystem for DeadFs {
    fn getattr(&self, _: &Request, _: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.hold(Held::Attr(reply));
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.hold(Held::Open(reply));
    }
}

impl Drop for Dead {
    fn drop(&mut self) {
        self.0.lock().take();
    }
}

#[test]
fn a_file_system_that_never_answers_holds_up_nobody() {
    let Some(mount) = Mount::new(&["--no-compact"], |source| {
        for name in ["a.vhdx", "b.vhdx", "c.vhdx"] {
            create(&source.join(name), &["--size", "64M"]);
        }
        fs::create_dir(source.join("dead")).unwrap();
    }) else {
        return;
    };
    time_to_open(&mount, "a.vhdx.raw", 1);
    let open = File::open(mount.at("b.vhdx.raw")).unwrap();
    fs::metadata(mount.at("dead")).unwrap();
    let asked = Arc::new(Mutex::new(Some(Vec::new())));
    let config = fuser::Config::default();
    let session = fuser::spawn_mount(DeadFs(asked.clone()), mount.behind("dead"), &config);
    let _session = session.unwrap();
    let _mounted = Mounted(mount.behind("dead"));
    let dead = Dead(asked);
    // It is waited for once.
    let spent = time_to_open(&mount, "a.vhdx.raw", 20);
    assert!(spent < Duration::from_secs(4), "{spent:?}");
    let nobody_asked = dead.0.lock().as_ref().is_none_or(Vec::is_empty);
    assert!(!nobody_asked);
    let spent = time_to_open(&mount, "b.vhdx.raw", 20);
    assert!(spent < Duration::from_millis(900), "{spent:?}");
    assert_eq!(mount.said("./dead cannot be looked into"), 1);
    // Who asks about it keeps nobody from what is open.
    for _ in 0..40 {
        let path = mount.at("dead");
        std::thread::spawn(move || fs::metadata(path));
    }
    std::thread::sleep(Duration::from_millis(50));
    let (done, ends) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(open.read_at(&mut [0; 512], 32 << 20)));
    let read = ends.recv_timeout(Duration::from_secs(3));
    assert_eq!(read.expect("reads are served").unwrap(), 512);
    // All else is looked at.
    create_child(&mount.behind("child.vhdx"), &mount.behind("c.vhdx"));
    let refused = open_for_writing(&mount.at("c.vhdx.raw"));
    assert_eq!(errno(refused), Errno::ACCESS.raw_os_error());
}

#[test]
fn a_guest_of_ours_in_the_directory_is_not_entered() {
    if !has("mkfs.ext4") {
        return;
    }
    let Some(mount) = Mount::new(&["--no-compact"], |source| {
        create(&source.join("a.vhdx"), &["--size", "64M"]);
        create(&source.join("b.vhdx"), &["--size", "64M"]);
    }) else {
        return;
    };
    let disk = mount.at("a.vhdx.raw");
    let made = Command::new("mkfs.ext4")
        .arg("-q")
        .arg("-F")
        .arg(&disk)
        .status();
    assert!(made.unwrap().success());
    let guest = ["-o", "loop", disk.to_str().unwrap()];
    let Some(_guest) = Mounted::new(&guest, &mount.behind("guest")) else {
        return;
    };
    create(&mount.behind("guest/c.vhdx"), &["--size", "64M"]);
    let shown = mount.mount_point();
    let shown = ["--bind", shown.to_str().unwrap()];
    let _again = Mounted::new(&shown, &mount.behind("again"));
    let spent = time_to_open(&mount, "b.vhdx.raw", 20);
    assert!(spent < Duration::from_secs(4), "{spent:?}");
    assert_eq!(mount.said("./guest cannot be looked into"), 1);
    for name in ["guest", "again", "guest/c.vhdx.raw"] {
        let refused = errno(fs::metadata(mount.at(name)));
        assert_eq!(refused, Errno::ACCESS.raw_os_error(), "{name}");
    }
}
