//! Parents that were renamed or moved, on the command line, and those without an identity.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::{create, exit_code, json, run, stderr};
use serde_json::json;
use vhdfs::disk::{Disk, OpenOptions};

const FORMATS: [&str; 2] = ["vhd", "vhdx"];

/// Runs it with these arguments, and `path` behind them.
fn command(arguments: &[&str], path: &Path) -> Output {
    let all = arguments.iter().map(OsStr::new);
    run(all.chain([path.as_os_str()]))
}

/// A base and a child of it in `top`, both of which hold something.
fn pair(top: &Path, format: &str) -> [std::path::PathBuf; 2] {
    let [base, child] = ["base", "kid"].map(|name| top.join(format!("{name}.{format}")));
    let write = |path: &Path, at| {
        let disk = Disk::open(path, &OpenOptions::default()).unwrap();
        disk.write_at(b"here", at).unwrap();
        disk.close().unwrap();
    };
    create(&base, &["--size", "64M"]);
    write(&base, 4096);
    create(&child, &["--parent", base.to_str().unwrap()]);
    write(&child, 9 << 20);
    [base, child]
}

#[test]
fn a_renamed_parent_can_be_named_or_written_into_its_child() {
    for format in FORMATS {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().canonicalize().unwrap();
        let [base, child] = pair(&top, format);
        let renamed = top.join("Win98 base");
        fs::rename(&base, &renamed).unwrap();
        let named = renamed.to_str().unwrap();
        for name in ["info", "check", "compact", "map"] {
            let refused = command(&[name], &child);
            assert_eq!(exit_code(&refused), 1, "{name}");
            let told = [&refused.stdout[..], &refused.stderr[..]].concat();
            let told = String::from_utf8(told).unwrap();
            for part in ["--parent FILE", "vhdfs relink", "--parent-dir"] {
                assert!(told.contains(part), "{name}: {told}");
            }
            let opened = command(&[name, "--parent", named], &child);
            assert_eq!(exit_code(&opened), 0, "{name}: {}", stderr(&opened));
        }
        let before = fs::read(&renamed).unwrap();
        let done = json(&command(&["relink", "--json", "--parent", named], &child));
        assert_eq!(done["parent"], json!(renamed));
        assert_eq!(done["relative_path"], r".\Win98 base");
        let info = json(&command(&["info", "--json"], &child));
        assert_eq!(info["parents"][0]["file"], json!(renamed));
        assert_eq!(exit_code(&command(&["check"], &child)), 0);
        assert!(fs::read(&renamed).unwrap() == before);
        libvhdi_finds("Win98 base", &child);
    }
}

/// What another program reads of a child that was relinked, where it is installed.
fn libvhdi_finds(parent: &str, child: &Path) {
    let Ok(output) = Command::new("vhdiinfo").arg(child).output() else {
        println!("skipped: vhdiinfo is not installed");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains(parent), "{text}");
}

#[test]
fn only_the_parent_is_written_into_a_child() {
    for format in FORMATS {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().canonicalize().unwrap();
        let [base, child] = pair(&top, format);
        let other = top.join(format!("other.{format}"));
        create(&other, &["--size", "64M"]);
        let identity = |path: &Path| {
            let info = json(&command(&["info", "--json"], path));
            info["identity"].as_str().unwrap().to_owned()
        };
        let [right, wrong] = [&base, &other].map(|path| identity(path));
        let before = fs::read(&child).unwrap();
        let refused = command(&["relink", "--parent", other.to_str().unwrap()], &child);
        assert_eq!(exit_code(&refused), 1);
        let told = stderr(&refused);
        assert!(told.contains(&right) && told.contains(&wrong), "{told}");
        assert!(!told.contains("--parent FILE"), "{told}");
        assert!(fs::read(&child).unwrap() == before);

        // To another directory: that takes leave, as ever.
        fs::create_dir(top.join("bases")).unwrap();
        fs::create_dir(top.join("vms")).unwrap();
        let [base, child] = [(&base, "bases"), (&child, "vms")].map(|(path, directory)| {
            let place = top.join(directory).join(path.file_name().unwrap());
            fs::rename(path, &place).unwrap();
            place
        });
        let moved = command(&["relink", "--parent", base.to_str().unwrap()], &child);
        assert_eq!(exit_code(&moved), 0, "{}", stderr(&moved));
        let text = String::from_utf8(moved.stdout.clone()).unwrap();
        assert!(text.contains(r"..\bases\base."), "{text}");
        assert!(
            stderr(&moved).contains("--parent-dir"),
            "{}",
            stderr(&moved)
        );
        let bases = top.join("bases");
        let arguments = ["info", "--parent-dir", bases.to_str().unwrap()];
        assert_eq!(exit_code(&command(&arguments, &child)), 0);
    }
}

#[test]
fn a_parent_without_identity_gets_one_on_request() {
    let root = tempfile::tempdir().unwrap();
    let [base, child] = ["base.vhd", "kid.vhd"].map(|name| root.path().join(name));
    create(&base, &["--size", "8M"]);
    let mut bytes = fs::read(&base).unwrap();
    let end = bytes.len() - 512;
    for at in [0, end] {
        bytes[at + 68..at + 84].fill(0);
        bytes[at + 64..at + 68].fill(0);
        let sum: u32 = bytes[at..at + 512]
            .iter()
            .map(|byte| u32::from(*byte))
            .sum();
        bytes[at + 64..at + 68].copy_from_slice(&(!sum).to_be_bytes());
    }
    fs::write(&base, &bytes).unwrap();
    let parent = base.to_str().unwrap();
    let refused = command(&["create", "--parent", parent], &child);
    assert_eq!(exit_code(&refused), 1);
    let told = stderr(&refused);
    assert!(
        told.contains("base.vhd") && told.contains("--give-identity"),
        "{told}"
    );
    assert!(!child.exists() && fs::read(&base).unwrap() == bytes);
    create(&child, &["--give-identity", "--parent", parent]);
    assert_eq!(exit_code(&command(&["info"], &child)), 0);
    // It has one now, which stays.
    let given = fs::read(&base).unwrap();
    create(
        &root.path().join("second.vhd"),
        &["--give-identity", "--parent", parent],
    );
    assert!(fs::read(&base).unwrap() == given);
}
