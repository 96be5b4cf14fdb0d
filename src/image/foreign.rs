//! What is said of a file that is no image.

use crate::error::FormatError;
use crate::format::Format;
use crate::format::magic::{Advice, Foreign, LOOK_LEN, recognise};
use crate::storage::Storage;
use crate::units::{FileOffset, u64_from, usize_from};

/// That the file in `storage` is no image of this format; what it is instead, where that is known.
pub(crate) fn none(storage: &dyn Storage, format: Format) -> FormatError {
    let (nothing, wanted) = match format {
        Format::Vhd => (FormatError::NotVhd, "VHD"),
        Format::Vhdx => (FormatError::NotVhdx, "VHDX"),
    };
    match look(storage) {
        Some(found) => FormatError::Foreign {
            wanted,
            found: found.what,
            advice: advice(found, format),
        },
        None => nothing,
    }
}

/// A host that cannot read has failed before, or will.
fn look(storage: &dyn Storage) -> Option<Foreign> {
    let len = storage.len().ok()?.min(u64_from(LOOK_LEN));
    let mut start = vec![0; usize_from(len)];
    (storage.read_exact_at(&mut start, FileOffset::new(0))).ok()?;
    recognise(&start)
}

fn advice(found: Foreign, format: Format) -> String {
    match (found.advice, format) {
        (Advice::Convert("raw"), Format::Vhd) => {
            "it may be a fixed VHD that has lost its footer; else `qemu-img convert -f raw -O vpc` \
             makes a VHD of it"
                .to_owned()
        }
        (Advice::Convert(from), Format::Vhd) => {
            format!("`qemu-img convert -f {from} -O vpc` makes a VHD of it")
        }
        (Advice::Convert(from), Format::Vhdx) => {
            format!("`qemu-img convert -f {from} -O vhdx` makes a VHDX of it")
        }
        (Advice::Unpack, _) => "unpack it first".to_owned(),
        (Advice::FetchAgain, _) => {
            "if it was downloaded, that is what the server answered instead of the disk".to_owned()
        }
        (Advice::CopyAgain, _) => {
            "a copy or a download of it has not begun, or has failed".to_owned()
        }
        (Advice::LfsPull, _) => "`git lfs pull` fetches the file itself".to_owned(),
        (Advice::None, _) => "nothing here can use it".to_owned(),
    }
}
