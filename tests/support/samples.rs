//! Disk images that other programs made. They are read from the folder that `VHDFS_SAMPLES` names, or
//! `../shared/samples`; without it the tests skip and say so.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The folder of the samples; `None`, and it is said why, if there is none.
pub(crate) fn samples() -> Option<PathBuf> {
    let named = std::env::var_os("VHDFS_SAMPLES").map(PathBuf::from);
    let folder =
        named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/samples"));
    if folder.is_dir() {
        return Some(folder);
    }
    println!("skipped: no sample images in {}", folder.display());
    None
}

/// Unpacks a sample into `folder`; copies it where it has been unpacked already, for hosts without the tool.
pub(crate) fn unpack(samples: &Path, folder: &Path, name: &str) -> PathBuf {
    let unpacked = samples.join(name);
    if unpacked.is_file() {
        let path = folder.join(name);
        fs::copy(unpacked, &path).expect("copied");
        return path;
    }
    let packed = samples.join(format!("{name}.bz2"));
    let output = Command::new("bzip2")
        .args(["-dc"])
        .arg(&packed)
        .stdout(Stdio::piped())
        .spawn()
        .and_then(|mut child| {
            let mut bytes = Vec::new();
            child
                .stdout
                .take()
                .expect("piped")
                .read_to_end(&mut bytes)?;
            child.wait().map(|status| (status, bytes))
        });
    let (status, bytes) = output.expect("bzip2 runs");
    assert!(status.success(), "{} does not unpack", packed.display());
    let path = folder.join(name);
    fs::write(&path, bytes).expect("written");
    path
}
