//! Thousands of disks in a directory, and few descriptors.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use common::{Mount, create, eventually, stderr};

/// That many disks: two, and copies of them that store only what is not zero.
fn fill(source: &Path, count: u64) {
    let originals = ["0.vhd", "1.vhdx"].map(|name| {
        create(&source.join(name), &["--size", "1G"]);
        fs::read(source.join(name)).unwrap()
    });
    for n in 2..count {
        let (extension, original) = if n.is_multiple_of(2) {
            ("vhd", &originals[0])
        } else {
            ("vhdx", &originals[1])
        };
        let copy = File::create(source.join(format!("{n}.{extension}"))).unwrap();
        copy.set_len(u64::try_from(original.len()).unwrap())
            .unwrap();
        for (page, bytes) in (0..).zip(original.chunks(4096)) {
            if bytes.iter().any(|byte| *byte != 0) {
                copy.write_all_at(bytes, page * 4096).unwrap();
            }
        }
    }
}

fn shown(mount: &Mount, n: u64) -> std::path::PathBuf {
    mount.at(&format!(
        "{n}.{}.raw",
        if n.is_multiple_of(2) { "vhd" } else { "vhdx" }
    ))
}

fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Kilobytes of memory, as the kernel has it under that name.
fn memory(pid: i32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap();
    line.trim_start_matches(':')
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

#[test]
fn descriptors_are_bounded_and_what_is_open_stays_so() {
    const LIMIT: usize = 256;
    let Some(mount) = Mount::new(&[], |source| fill(source, 2000)) else {
        return;
    };
    mount.unmount();
    let mut command = Command::new("sh");
    let limited = format!("ulimit -n {LIMIT} && exec \"$@\"");
    command.args([
        "-c",
        &limited,
        "sh",
        env!("CARGO_BIN_EXE_vhdfs"),
        "mount",
        "--no-compact",
    ]);
    command.arg(mount.source()).arg(mount.mount_point());
    let output = command.stdout(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let pid = mount.pid();

    // Some stay open all the time, with something in them.
    let held: Vec<File> = (0..40)
        .map(|n| {
            File::options()
                .read(true)
                .write(true)
                .open(shown(&mount, n))
                .unwrap()
        })
        .collect();
    for (n, file) in (0_u8..).zip(&held) {
        file.write_all_at(&[n; 4096], 1 << 20).unwrap();
    }
    let (mut most, begun) = (0, Instant::now());
    for n in 100..400 {
        let write = n % 3 == 0;
        let file = File::options()
            .read(true)
            .write(write)
            .open(shown(&mount, n));
        let mut byte = [1];
        file.unwrap().read_exact_at(&mut byte, 5 << 20).unwrap();
        assert_eq!(byte, [0]);
        most = most.max(descriptors(pid));
    }
    println!(
        "300 disks in {:?}, {most} descriptors at most",
        begun.elapsed()
    );
    assert!(most < LIMIT * 3 / 4, "{most} descriptors of {LIMIT}");
    // The kernel takes its time to say that a file was closed.
    eventually("all others are closed", || {
        mount.status("")["handles"] == 40
    });
    let status = mount.status("");
    assert!(status["disks_open"].as_u64().unwrap() <= 64, "{status}");
    for (n, file) in (0_u8..).zip(&held) {
        let mut found = [9; 4096];
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        file.read_exact_at(&mut found, 1 << 20).unwrap();
        assert!(found.iter().all(|byte| *byte == n), "disk {n}");
        file.write_all_at(&[n | 0x40; 512], 0).unwrap();
        file.sync_all().unwrap();
    }
    // More handles than there are descriptors: that is said, and nothing else suffers.
    let mut more = Vec::new();
    let refused = (400..700).find_map(|n| match File::open(shown(&mount, n)) {
        Ok(file) => {
            more.push(file);
            None
        }
        Err(error) => Some(error),
    });
    assert!(
        refused.is_some() && more.len() > 20,
        "{} more, {refused:?}",
        more.len()
    );
    for file in &held {
        file.write_all_at(&[7; 512], 4096).unwrap();
        file.sync_all().unwrap();
    }
    drop(more);
    eventually("there is room again", || {
        File::open(shown(&mount, 1999)).is_ok()
    });
    drop(held);
    mount.unmount();
}

#[test]
fn a_directory_of_thousands_is_there_at_once() {
    let count = 1000 * common::env_number("VHDFS_SOAK", 2).min(10);
    let Some(mount) = Mount::new(&[], |source| fill(source, count)) else {
        return;
    };
    mount.unmount();
    let begun = Instant::now();
    mount.mount(&[]);
    let mounted = begun.elapsed();
    let first = fs::metadata(shown(&mount, count - 1)).unwrap().len();
    let looked = begun.elapsed();
    assert_eq!(first, 1 << 30);
    let listed = mount.names("").len();
    let all = begun.elapsed();
    assert_eq!(u64::try_from(listed).unwrap(), count);
    let writer = File::options().write(true).open(shown(&mount, 0)).unwrap();
    let opened = begun.elapsed();
    for n in 0..count {
        assert_eq!(fs::metadata(shown(&mount, n)).unwrap().len(), 1 << 30);
    }
    let known = begun.elapsed();
    drop(writer);
    let pid = mount.pid();
    println!(
        "{count} disks: mounted after {mounted:?}, one looked at {looked:?}, all listed {all:?}, one \
         open for writing {opened:?}, all sizes known {known:?}; {} descriptors, {} KiB",
        descriptors(pid),
        memory(pid, "VmRSS")
    );
    assert!(
        mounted.as_secs() < 5 && opened.as_secs() < 20,
        "{mounted:?} {opened:?}"
    );
    assert!(descriptors(pid) < 200, "{}", descriptors(pid));
    assert!(
        memory(pid, "VmHWM") < (64 << 10) + 4 * count,
        "{} KiB",
        memory(pid, "VmHWM")
    );
}
