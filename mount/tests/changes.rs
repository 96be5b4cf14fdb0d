//! What others do to the files under a running mount, and to the daemon itself.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Mount, assert_clean, create, errno, eventually, exit_code, has, run, stderr, vhdfs};
use rustix::fs::{Advice, fadvise};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

const MIB: u64 = 1 << 20;
const FORMATS: [&str; 2] = ["vhd", "vhdx"];

fn sample(options: &[&str]) -> Option<Mount> {
    Mount::new(options, |source| {
        for format in FORMATS {
            create(
                &source.join(format!("a.{format}")),
                &["--size", "64M", "--block-size", "2M"],
            );
            create(
                &source.join(format!("b.{format}")),
                &["--size", "64M", "--block-size", "2M"],
            );
        }
    })
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Tests both formats side by side: there is waiting in it.
fn each_format(test: impl Fn(&str) + Sync) {
    std::thread::scope(|scope| {
        let tests = FORMATS.map(|format| {
            scope.spawn({
                let test = &test;
                move || test(format)
            })
        });
        for test in tests {
            test.join().unwrap();
        }
    });
}

/// Reads past what the kernel has cached.
fn read(file: &File, at: u64) -> std::io::Result<u8> {
    fadvise(file, 0, None, Advice::DontNeed).unwrap();
    let mut byte = [0; 4096];
    file.read_exact_at(&mut byte, at)?;
    Ok(byte[0])
}

/// That the other disk of that format is in order, and so the daemon.
fn others_do_not_notice(mount: &Mount, format: &str) {
    let file = open(&mount.at(&format!("b.{format}.raw")));
    file.write_all_at(&[3; 70_000], 5 * MIB).unwrap();
    file.sync_all().unwrap();
    assert_eq!(read(&file, 5 * MIB).unwrap(), 3);
}

#[test]
fn a_file_that_is_cut_gives_errors() {
    each_format(|format| {
        let Some(mount) = sample(&["--no-compact"]) else {
            return;
        };
        let (name, backing) = (format!("a.{format}"), mount.behind(&format!("a.{format}")));
        let file = open(&mount.at(&format!("{name}.raw")));
        for block in 0..8 {
            file.write_all_at(&[5; 4096], block * 2 * MIB).unwrap();
        }
        file.sync_all().unwrap();
        let cut = File::options().write(true).open(&backing).unwrap();
        cut.set_len(9 * MIB).unwrap();
        assert_eq!(read(&file, 0).unwrap(), 5, "what is there is there");
        for _ in 0..3 {
            assert_eq!(errno(read(&file, 14 * MIB)), Errno::IO.raw_os_error());
        }
        // A write to what is gone cannot be made safe; nor can any other from then on.
        let _ = file.write_all_at(&[6; 4096], 14 * MIB);
        assert_eq!(errno(file.sync_all()), Errno::IO.raw_os_error());
        assert_eq!(
            errno(file.write_all_at(&[6; 4096], 40 * MIB)),
            Errno::IO.raw_os_error()
        );
        others_do_not_notice(&mount, format);
        // Once that it cannot be read, and once that it takes no more changes.
        assert_eq!(
            mount.said(&format!("{name}: read at")),
            1,
            "{}",
            mount.log()
        );
        assert_eq!(
            mount.said(&format!("{name}: write at")),
            1,
            "{}",
            mount.log()
        );
        assert_eq!(mount.said(&name), 2, "{}", mount.log());
        drop(file);
        // Whoever opens it next hears what has become of it, and nothing is made worse.
        eventually("it is closed", || {
            mount.status(&format!("{name}.raw"))["state"] == "closed"
        });
        let now = fs::read(&backing).unwrap();
        assert!(
            File::options()
                .write(true)
                .open(mount.at(&format!("{name}.raw")))
                .is_err()
        );
        assert!(fs::read(&backing).unwrap() == now);
        mount_ends(&mount);
    });
}

/// Unmounts; not all may have been left clean.
fn mount_ends(mount: &Mount) {
    let _ = run([Path::new("unmount"), &mount.mount_point()]);
    assert!(!mount.is_mounted());
}

#[test]
fn a_cut_is_noticed_before_the_file_is_written_to_any_further() {
    for format in FORMATS {
        let Some(mount) = sample(&["--no-compact"]) else {
            return;
        };
        let file = open(&mount.at(&format!("a.{format}.raw")));
        file.write_all_at(&[5; 4096], 0).unwrap();
        file.sync_all().unwrap();
        let backing = mount.behind(&format!("a.{format}"));
        let len = fs::metadata(&backing).unwrap().len();
        File::options()
            .write(true)
            .open(&backing)
            .unwrap()
            .set_len(len - 4096)
            .unwrap();
        let written = file.write_all_at(&[6; 4096], 0);
        assert_eq!(errno(written), Errno::IO.raw_os_error(), "{format}");
        let failed = file.sync_all();
        assert_eq!(errno(failed), Errno::IO.raw_os_error(), "{format}");
        let log = mount.log();
        assert!(log.contains("another program has cut it to"), "{log}");
        assert!(file.write_all_at(&[7; 4096], 20 * MIB).is_err());
        others_do_not_notice(&mount, format);
    }
}

/// Writes that come after the cut do not make the file long again, and so hide what it has lost.
#[test]
fn a_cut_is_not_grown_over() {
    each_format(|format| {
        let Some(mount) = sample(&["--idle-after", "100ms"]) else {
            return;
        };
        let (name, backing) = (format!("a.{format}"), mount.behind(&format!("a.{format}")));
        let file = open(&mount.at(&format!("{name}.raw")));
        for block in 0..8 {
            file.write_all_at(&[5; 64 << 10], block * 2 * MIB).unwrap();
        }
        file.sync_all().unwrap();
        let cut = File::options().write(true).open(&backing).unwrap();
        let len = cut.metadata().unwrap().len();
        cut.set_len(if format == "vhd" { len / 2 } else { 0 })
            .unwrap();
        for block in [7, 20, 30] {
            let written = file.write_all_at(&[6; 64 << 10], block * 2 * MIB);
            assert_eq!(errno(written), Errno::IO.raw_os_error(), "{format}");
        }
        assert_eq!(errno(file.sync_all()), Errno::IO.raw_os_error());
        let log = mount.log();
        assert!(log.contains("another program has cut it to"), "{log}");
        assert!(cut.metadata().unwrap().len() <= len / 2);
        for block in 4..8 {
            assert!(read(&file, block * 2 * MIB).is_err(), "{format}");
        }
        others_do_not_notice(&mount, format);
        drop(file);
        mount_ends(&mount);
    });
}

/// A limit of the files' size is a full host, and not the end of the daemon.
#[test]
fn a_file_may_be_as_long_as_a_limit_lets_it() {
    let place = tempfile::tempdir().unwrap();
    let limited = |words: &str| {
        let program = env!("CARGO_BIN_EXE_vhdfs");
        let script = format!("ulimit -f 20480; exec {program} {words}");
        let mut shell = Command::new("sh");
        shell.current_dir(place.path()).args(["-c", &script]);
        shell.output().unwrap()
    };
    for format in FORMATS {
        let name = format!("fixed.{format}");
        let output = limited(&format!("create --type fixed --size 64M {name}"));
        assert_eq!(exit_code(&output), 1, "{}", stderr(&output));
        assert!(!place.path().join(name).exists(), "nothing is left behind");
    }
    if !has("fusermount3") {
        println!("skipped: no fusermount3");
        return;
    }
    fs::create_dir_all(place.path().join("mnt")).unwrap();
    for format in FORMATS {
        let disk = place.path().join("disks").join(format!("a.{format}"));
        fs::create_dir_all(disk.parent().unwrap()).unwrap();
        create(&disk, &["--size", "64M", "--block-size", "2M"]);
    }
    let mounted = limited("mount disks mnt");
    if exit_code(&mounted) != 0 {
        println!("skipped: {}", stderr(&mounted));
        return;
    }
    for format in FORMATS {
        let file = open(&place.path().join(format!("mnt/a.{format}.raw")));
        let mut written = 0;
        while written < 30 && file.write_all_at(&[5; 4096], written * 2 * MIB).is_ok() {
            written += 1;
        }
        assert!((2..10).contains(&written), "{format}: {written}");
        let more = file.write_all_at(&[6; 4096], 40 * MIB);
        assert_eq!(errno(more), Errno::NOSPC.raw_os_error(), "{format}");
        file.sync_all().unwrap();
        assert_eq!(read(&file, (written - 1) * 2 * MIB).unwrap(), 5);
    }
    let output = run([Path::new("unmount"), &place.path().join("mnt")]);
    assert_eq!(exit_code(&output), 0, "{}", stderr(&output));
    for format in FORMATS {
        assert_clean(&place.path().join("disks").join(format!("a.{format}")));
    }
}

#[test]
fn the_new_file_under_an_old_name_is_not_written() {
    for format in FORMATS {
        let Some(mount) = sample(&["--no-compact"]) else {
            return;
        };
        let (backing, other) = (mount.behind(&format!("a.{format}")), mount.behind("new"));
        let shown = mount.at(&format!("a.{format}.raw"));
        let old = open(&shown);
        old.write_all_at(&[5; 4096], 0).unwrap();
        fs::copy(mount.behind(&format!("b.{format}")), &other).unwrap();
        let before = fs::read(&other).unwrap();
        fs::rename(&other, &backing).unwrap();
        old.write_all_at(&[6; 4096], 30 * MIB).unwrap();
        old.sync_all().unwrap();
        assert_eq!(read(&old, 30 * MIB).unwrap(), 6);
        assert!(
            fs::read(&backing).unwrap() == before,
            "the old handle wrote to the new file"
        );
        // Deleted, too, it goes on for those who have it.
        fs::remove_file(&backing).unwrap();
        old.write_all_at(&[7; 4096], 10 * MIB).unwrap();
        old.sync_all().unwrap();
        assert_eq!(errno(File::open(&shown)), Errno::NOENT.raw_os_error());
        create(&backing, &["--size", "8M"]);
        assert_eq!(fs::metadata(&shown).unwrap().len(), 8 << 20);
        let before = fs::read(&backing).unwrap();
        old.write_all_at(&[8; 4096], 12 * MIB).unwrap();
        drop(old);
        assert_eq!(read(&open(&shown), 0).unwrap(), 0);
        others_do_not_notice(&mount, format);
        mount.unmount();
        assert_clean(&backing);
        assert!(fs::read(&backing).unwrap()[..512] == before[..512]);
        assert_eq!(
            mount.log().lines().count(),
            2,
            "mounted, unmounted: {}",
            mount.log()
        );
    }
}

#[test]
fn the_directory_goes_away() {
    let Some(mount) = sample(&["--idle-after", "100ms"]) else {
        return;
    };
    let file = open(&mount.at("a.vhd.raw"));
    fs::remove_dir_all(mount.source()).unwrap();
    file.write_all_at(&[5; 4096], 0).unwrap();
    file.sync_all().unwrap();
    assert_eq!(read(&file, 0).unwrap(), 5);
    assert_eq!(mount.names(""), [""; 0]);
    assert_eq!(
        errno(File::open(mount.at("b.vhd.raw"))),
        Errno::NOENT.raw_os_error()
    );
    // Another one of that name is another one.
    fs::create_dir(mount.source()).unwrap();
    create(&mount.behind("c.vhd"), &["--size", "8M"]);
    assert_eq!(mount.names(""), [""; 0]);
    drop(file);
    mount.unmount();
}

#[test]
fn the_file_system_underneath_is_unmounted() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root mounts");
        return;
    }
    let Some(mount) = sample(&[]) else { return };
    mount.unmount();
    let tmpfs = |arguments: &[&str]| {
        let mut command = Command::new(arguments[0]);
        command
            .args(&arguments[1..])
            .arg(mount.source())
            .stderr(Stdio::null());
        command.status().unwrap().success()
    };
    if !tmpfs(&["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs"]) {
        println!("skipped: no tmpfs may be mounted");
        return;
    }
    create(&mount.behind("a.vhd"), &["--size", "64M"]);
    mount.mount(&["--idle-after", "100ms"]);
    let file = open(&mount.at("a.vhd.raw"));
    file.write_all_at(&[5; 4096], 0).unwrap();
    assert!(!tmpfs(&["umount"]), "it is in use");
    // Out of sight, it is there for us as long as we need it.
    assert!(tmpfs(&["umount", "--lazy"]));
    file.write_all_at(&[6; 4096], 20 * MIB).unwrap();
    file.sync_all().unwrap();
    assert_eq!(read(&file, 20 * MIB).unwrap(), 6);
    assert_eq!(mount.names(""), ["a.vhd.raw"]);
    // What lies under it now is not touched: these are the disks from before.
    let before = fs::read(mount.behind("a.vhd")).unwrap();
    drop(file);
    mount.unmount();
    assert!(fs::read(mount.behind("a.vhd")).unwrap() == before);
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap()
}

#[test]
fn signals_at_any_time() {
    let harmless = [
        Signal::USR1,
        Signal::USR2,
        Signal::PIPE,
        Signal::ALARM,
        Signal::CHILD,
    ];
    let Some(mount) = sample(&["--idle-after", "0s"]) else {
        return;
    };
    let pid = Pid::from_raw(mount.pid()).unwrap();
    let file = open(&mount.at("a.vhd.raw"));
    for round in 0..40_u64 {
        kill_process(pid, harmless[usize::try_from(round % 5).unwrap()]).unwrap();
        file.write_all_at(&[9; 9000], round * MIB).unwrap();
        file.sync_all().unwrap();
    }
    others_do_not_notice(&mount, "vhd");
    // Told to end again and again, it ends once, and in order.
    let begun = Instant::now();
    while kill_process(pid, Signal::TERM).is_ok() && begun.elapsed() < Duration::from_secs(20) {
        for signal in [Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1] {
            let _ = kill_process(pid, signal);
        }
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
        if stat.is_ok_and(|stat| stat.contains(") Z")) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    eventually("it is unmounted", || !mount.is_mounted());
    drop(file);
    assert_eq!(mount.said("signal"), 1, "{}", mount.log());
    for format in FORMATS {
        assert_clean(&mount.behind(&format!("a.{format}")));
    }
}

#[test]
fn signals_during_a_compaction() {
    let root = tempfile::tempdir().unwrap();
    for format in FORMATS {
        let path = root.path().join(format!("a.{format}"));
        create(&path, &["--size", "256M", "--block-size", "2M"]);
        let disk = vhdfs::disk::Disk::open(&path, &vhdfs::disk::OpenOptions::default()).unwrap();
        for block in 0..60_u8 {
            let data = if block % 2 == 0 { 0 } else { block };
            disk.write_at(&[1; 4096], u64::from(block) * 2 * MIB)
                .unwrap();
            disk.write_at(&[data; 4096], u64::from(block) * 2 * MIB)
                .unwrap();
        }
        disk.close().unwrap();
        drop(disk);
        let signals = [
            Signal::INT,
            Signal::TERM,
            Signal::HUP,
            Signal::USR1,
            Signal::PIPE,
            Signal::KILL,
        ];
        for round in 0..18 {
            let mut command = vhdfs();
            command
                .arg("compact")
                .arg(&path)
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            std::thread::sleep(Duration::from_millis(3 * u64::try_from(round).unwrap()));
            for _ in 0..2 {
                let _ = kill_process(pid_of(&child), signals[round % signals.len()]);
            }
            child.wait().unwrap();
            let checked = run([Path::new("check"), &path]);
            assert_eq!(
                exit_code(&checked),
                0,
                "{format} {round}: {}",
                stderr(&checked)
            );
        }
        // Nobody reads what it says, either.
        let mut command = vhdfs();
        command
            .arg("compact")
            .arg(&path)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop((child.stdout.take(), child.stderr.take()));
        child.wait().unwrap();
        assert_clean(&path);
        let disk = vhdfs::disk::Disk::open(&path, &vhdfs::disk::OpenOptions::default()).unwrap();
        let mut byte = [0];
        for block in 0..60_u8 {
            disk.read_at(&mut byte, u64::from(block) * 2 * MIB).unwrap();
            assert_eq!(byte[0], if block % 2 == 0 { 0 } else { block });
        }
    }
}

#[test]
fn two_of_us_do_not_share_a_disk() {
    let Some(mount) = sample(&["--no-compact"]) else {
        return;
    };
    let second = tempfile::tempdir().unwrap();
    let output = run([
        Path::new("mount"),
        Path::new("--no-compact"),
        &mount.source(),
        second.path(),
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let done = std::panic::catch_unwind(|| {
        each_format(|format| {
            let (name, backing) = (
                format!("a.{format}.raw"),
                mount.behind(&format!("a.{format}")),
            );
            let ours = open(&mount.at(&name));
            let before = fs::read(&backing).unwrap();
            let theirs = File::options().write(true).open(second.path().join(&name));
            assert_eq!(errno(theirs), Errno::BUSY.raw_os_error(), "{format}");
            let file = backing.to_str().unwrap();
            let child = mount.behind(&format!("child.{format}"));
            let child = child.to_str().unwrap();
            for arguments in [
                &["compact", file][..],
                &["compact", "--dry-run", file],
                &["check", file],
                &["check", "--repair", file],
                &["check", "--repair", "--backup", file],
                &["check", "--restore", file, file],
                &["create", "--parent", file, child],
            ] {
                let output = run(arguments);
                assert_eq!(exit_code(&output), 1, "{arguments:?}");
                let text = stderr(&output);
                assert!(
                    text.contains("perhaps a mounted vhdfs"),
                    "{arguments:?}: {text}"
                );
                assert!(fs::read(&backing).unwrap() == before, "{arguments:?}");
            }
            // Looking is allowed.
            assert_eq!(exit_code(&run(["info", file])), 0);
            drop(ours);
            eventually("the second gets it", || {
                File::options()
                    .write(true)
                    .open(second.path().join(&name))
                    .is_ok()
            });
        });
    });
    let ended = run([Path::new("unmount"), second.path()]);
    assert!(ended.status.success(), "{}", stderr(&ended));
    done.unwrap();
}

#[test]
fn qemu_and_a_guest_do_not_share_a_disk() {
    if !has("qemu-io") || !has("qemu-img") {
        return;
    }
    let Some(mount) = sample(&["--no-compact"]) else {
        return;
    };
    each_format(|format| {
        let driver = if format == "vhd" { "vpc" } else { "vhdx" };
        let (name, backing) = (
            format!("a.{format}.raw"),
            mount.behind(&format!("a.{format}")),
        );
        let file = open(&mount.at(&name));
        file.write_all_at(&[5; 4096], 0).unwrap();
        file.sync_all().unwrap();
        let before = fs::read(&backing).unwrap();
        for (program, arguments) in [
            ("qemu-io", &["-f", driver, "-c", "write -P 9 0 4096"][..]),
            ("qemu-io", &["-r", "-f", driver, "-c", "read 0 4096"]),
            ("qemu-img", &["info", "-f", driver]),
            ("qemu-img", &["resize", "-f", driver]),
        ] {
            let mut command = Command::new(program);
            command.args(arguments).arg(&backing);
            if arguments[0] == "resize" {
                command.arg("1G");
            }
            let output = command.output().unwrap();
            let text = stderr(&output) + &String::from_utf8_lossy(&output.stdout);
            assert!(text.contains("lock"), "{program} {arguments:?}: {text}");
            assert!(
                fs::read(&backing).unwrap() == before,
                "{program} {arguments:?}"
            );
        }
        drop(file);
        let theirs_may_look = || {
            let mut command = Command::new("qemu-img");
            command.args(["info", "-f", driver]).arg(&backing);
            command.output().unwrap().status.success()
        };
        eventually("we let go of it", theirs_may_look);
        // And the other way round, as long as it has it.
        let mut command = Command::new("qemu-io");
        command.args(["-f", driver]).arg(&backing);
        let mut theirs = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut words = theirs.stdin.take().unwrap();
        words.write_all(b"read 0 512\n").unwrap();
        // Its answer shows that it has it.
        let mut answer = [0; 8];
        let mut said = theirs.stdout.take().unwrap();
        said.read_exact(&mut answer).unwrap();
        for _ in 0..3 {
            let refused = File::options().write(true).open(mount.at(&name));
            assert_eq!(errno(refused), Errno::BUSY.raw_os_error(), "{format}");
            assert_eq!(
                errno(File::open(mount.at(&name))),
                Errno::BUSY.raw_os_error()
            );
        }
        others_do_not_notice(&mount, format);
        drop(words);
        theirs.wait().unwrap();
        assert_eq!(read(&open(&mount.at(&name)), 0).unwrap(), 5);
    });
}
