//! Whether Windows attaches a disk file.
//!
//! Only what is known is looked at: Windows' own message with the error 0xC03A001A, that files of virtual disks
//! have to be uncompressed, unencrypted and not sparse, which goes for the parents as well; that a VHD has no more
//! than 2040 GiB; and that a differencing disk needs its parents. Programs that open a disk with flags of their own
//! may be less strict: WSL attaches the sparse files that it makes.

use std::path::Path;

use vhdfs::format::{Format, vhd};
use vhdfs::storage::host::{HostFile, HostForm, HostOptions};

use super::about;
use crate::Failure;
use crate::text::Bytes;

/// How the host stores a file, and what Windows does not attach because of that. Messages call it `name`.
pub(super) fn form_of(file: &Path, name: &str) -> Result<(HostForm, Vec<String>), Failure> {
    let options = HostOptions {
        read_only: true,
        lock: false,
        no_follow: false,
    };
    let form = (HostFile::open(file, &options)?.form()).map_err(|error| about(file, &error))?;
    let advice = "`vhdfs compact --unsparse` fills them";
    let sparse = match cfg!(windows) {
        true => format!("{name} while it may have holes, being sparse: {advice}"),
        // Not every tool that copies it there keeps them.
        false => format!("a copy of {name} that keeps its holes: {advice}"),
    };
    let refused = [
        (form.is_sparse, sparse),
        (form.is_compressed, format!("{name} while it is compressed")),
        (form.is_encrypted, format!("{name} while it is encrypted")),
    ];
    let refused = refused
        .into_iter()
        .filter_map(|(is_so, what)| is_so.then_some(what));
    Ok((form, refused.collect()))
}

/// A disk of that size, if Windows does not attach it.
pub(super) fn too_large(format: Format, virtual_size: u64) -> Option<String> {
    let most = vhd::MAX_DISK_LEN;
    (format == Format::Vhd && virtual_size > most)
        .then(|| format!("a VHD of more than {}", Bytes(most)))
}
