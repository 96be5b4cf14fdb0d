//! What a differencing VHD says of its parent.

use crate::error::FormatError;
use crate::format::parent::{Identity, ParentLink};
use crate::format::vhd::DynamicHeader;
use crate::image::LayoutError;
use crate::storage::Storage;

/// Reads the parent's identity and the paths to it out of `header` and its parent locators.
///
/// # Errors
/// Where the identity is missing: Xen's way to name a raw parent.
pub(super) fn read_parent_link(
    _storage: &dyn Storage,
    header: &DynamicHeader,
    _file_len: u64,
) -> Result<ParentLink, LayoutError> {
    if header.parent_unique_id() == [0; 16] {
        return Err(FormatError::incompatible(
            "a differencing disk without its parent's identity, as Xen makes over raw disks",
            "convert it with Xen's vhd-util",
        )
        .into());
    }
    Ok(ParentLink {
        identities: vec![Identity::Vhd(header.parent_unique_id())],
        paths: Vec::new(),
    })
}
