//! Children for tests, put together by hand.

use std::fs;
use std::path::Path;

use crate::create::{CreateOptions, create};

pub(crate) const SIZE: u64 = 8 << 20;

/// An empty dynamic VHD of [`SIZE`] bytes.
pub(crate) fn make_disk(path: &Path) {
    create(path, &CreateOptions::dynamic(SIZE)).unwrap();
}

/// The identity of the VHD at `path`.
pub(crate) fn identity_of(path: &Path) -> [u8; 16] {
    fs::read(path).unwrap()[68..84].try_into().unwrap()
}

/// A child of the VHD at `parent`, with the relative path `text` to it.
pub(crate) fn make_child(path: &Path, parent: &Path, text: &str) {
    make_child_of(path, identity_of(parent), &[(b"W2ru", text)]);
}

/// A child of the VHD with the identity `parent`, with these parent locators.
pub(crate) fn make_child_of(path: &Path, parent: [u8; 16], locators: &[(&[u8; 4], &str)]) {
    make_disk(path);
    let mut bytes = fs::read(path).unwrap();
    let mut footer = bytes.split_off(bytes.len() - 512);
    footer[60..64].copy_from_slice(&4_u32.to_be_bytes());
    fit_checksum(&mut footer, 64);
    bytes[552..568].copy_from_slice(&parent);
    for (n, (code, text)) in locators.iter().enumerate() {
        let data: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let len = u32::try_from(data.len()).unwrap();
        let offset = u64::try_from(bytes.len()).unwrap();
        let space = len.next_multiple_of(512);
        let locator = &mut bytes[1088 + 24 * n..1112 + 24 * n];
        locator[..4].copy_from_slice(*code);
        locator[4..8].copy_from_slice(&space.to_be_bytes());
        locator[8..12].copy_from_slice(&len.to_be_bytes());
        locator[16..].copy_from_slice(&offset.to_be_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    fit_checksum(&mut bytes[512..1536], 36);
    bytes[..512].copy_from_slice(&footer);
    bytes.extend(footer);
    fs::write(path, bytes).unwrap();
}

pub(crate) fn fit_checksum(structure: &mut [u8], at: usize) {
    structure[at..at + 4].fill(0);
    let sum: u32 = structure.iter().map(|byte| u32::from(*byte)).sum();
    structure[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}
