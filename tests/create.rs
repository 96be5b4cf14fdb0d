//! New disks are what other programs take for disks: QEMU and libvhdi, where they are installed.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use vhdfs::create::{CreateOptions, create};
use vhdfs::format::parent::{Identity, NewParent};
use vhdfs::format::{DiskType, Format};

const MIB: u64 = 1 << 20;

/// What `program` says, in English; `None`, said aloud, where it is not installed.
fn run(program: &str, arguments: &[&str], file: &Path) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .arg(file)
        .env("LC_ALL", "C")
        .output();
    match output {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            assert!(output.status.success(), "{program} {arguments:?}: {text}");
            Some(text)
        }
        Err(error) => {
            println!("skipped: {program}: {error}");
            None
        }
    }
}

/// All kinds of VHDX that QEMU knows.
fn vhdx_for_qemu() -> Vec<CreateOptions> {
    let mut all = Vec::new();
    for (disk_type, size, block_size) in [
        (DiskType::Dynamic, 100 * MIB + 512, 1 << 20),
        // Several chunks, so that entries of sector bitmaps stand between those of blocks.
        (DiskType::Dynamic, 20 << 30, 1 << 20),
        (DiskType::Dynamic, 64 << 40, 256 << 20),
        (DiskType::Fixed, 5 * MIB, 2 << 20),
        (DiskType::Fixed, (4 << 30) + MIB, 1 << 20),
    ] {
        all.push(CreateOptions {
            block_size: Some(block_size),
            ..CreateOptions::new(Format::Vhdx, disk_type, size)
        });
    }
    all
}

#[test]
fn qemu_takes_a_new_vhdx() {
    let folder = tempfile::tempdir().expect("a folder");
    for (number, options) in vhdx_for_qemu().into_iter().enumerate() {
        let path = folder.path().join(format!("{number}.vhdx"));
        create(&path, &options).expect("created");
        let Some(check) = run("qemu-img", &["check", "-f", "vhdx"], &path) else {
            return;
        };
        assert!(check.contains("No errors"), "{check}");
        let info = run("qemu-img", &["info", "--output=json"], &path).expect("there");
        assert!(info.contains(r#""format": "vhdx""#), "{info}");
        let size = format!(r#""virtual-size": {},"#, options.size);
        assert!(info.contains(&size), "{info}");
        if options.size < 1 << 30 {
            let raw = folder.path().join("raw");
            let source = path.to_str().expect("UTF-8");
            let convert = ["convert", "-f", "vhdx", "-O", "raw", source];
            run("qemu-img", &convert, &raw);
            let bytes = std::fs::read(&raw).expect("converted");
            assert_eq!(u64::try_from(bytes.len()), Ok(options.size));
            assert!(bytes.iter().all(|byte| *byte == 0));
        }
        // The bytes that QEMU writes across a border of chunks are the bytes that it reads.
        let at = (options.size / 2).min(4 << 30) / 65536 * 65536;
        let write = format!("write -P 7 {} 64k", at - 32768);
        let read = format!("read -P 7 {} 64k", at - 32768);
        run("qemu-io", &["-f", "vhdx", "-c", &write], &path);
        run("qemu-io", &["-f", "vhdx", "-c", &read], &path);
        let check = run("qemu-img", &["check", "-f", "vhdx"], &path).expect("there");
        assert!(check.contains("No errors"), "{check}");
    }
}

fn parent(identity: Identity, sector_size: u64) -> NewParent {
    NewParent {
        identity,
        disk_len: 64 * MIB,
        sector_size,
        mtime: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        relative: ".\\b\u{e4}se.vhdx".to_owned(),
        absolute: "C:\\disks\\b\u{e4}se.vhdx".to_owned(),
    }
}

#[test]
fn libvhdi_reads_what_a_new_disk_says() {
    let folder = tempfile::tempdir().expect("a folder");
    let id = uuid::Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
    let in_vhdx = Identity::Vhdx(id);
    let in_vhd = Identity::Vhd(*id.as_bytes());
    let sectors_4096 = CreateOptions {
        sector_size: 4096,
        ..CreateOptions::new(Format::Vhdx, DiskType::Dynamic, 40 << 30)
    };
    let fixed = CreateOptions::new(Format::Vhdx, DiskType::Fixed, 3 * MIB);
    let vhdx_path = "C:\\disks\\b\u{e4}se.vhdx";
    for (name, options, known) in [
        (
            "a.vhdx",
            sectors_4096,
            vec!["Dynamic", "40 GiB", "4096 bytes"],
        ),
        ("b.vhdx", fixed, vec!["Fixed", "3145728", "512 bytes"]),
        (
            "c.vhdx",
            CreateOptions::differencing(parent(in_vhdx, 512)),
            vec!["Differential", "67108864", &id.to_string(), vhdx_path],
        ),
        (
            "d.vhdx",
            CreateOptions::differencing(parent(in_vhdx, 4096)),
            vec!["Differential", "4096 bytes", vhdx_path],
        ),
        (
            "e.vhd",
            CreateOptions::differencing(parent(in_vhd, 512)),
            vec![
                "Differential",
                "67108864",
                &id.to_string(),
                "b\u{e4}se.vhdx",
            ],
        ),
    ] {
        let path = folder.path().join(name);
        create(&path, &options).expect("created");
        let Some(info) = run("vhdiinfo", &[], &path) else {
            return;
        };
        for text in known {
            assert!(info.contains(text), "no {text} in {info}");
        }
    }
}
