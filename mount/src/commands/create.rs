//! `vhdfs create`.

use vhdfs::create::{CreateOptions, create};
use vhdfs::format::DiskType;

use crate::cli::{CreateArguments, NewDiskType};
use crate::{Failure, Outcome};

/// Runs the command.
pub(crate) fn run(arguments: &CreateArguments) -> Result<Outcome, Failure> {
    let extension = arguments.file.extension().unwrap_or_default();
    if extension.eq_ignore_ascii_case("vhdx") {
        let name = arguments.file.display();
        return Err(format!("{name}: this version creates VHD, not VHDX: name it .vhd").into());
    }
    let options = CreateOptions {
        disk_type: match arguments.disk_type {
            NewDiskType::Dynamic => DiskType::Dynamic,
            NewDiskType::Fixed => DiskType::Fixed,
        },
        block_size: Some(u32::try_from(arguments.block_size)?),
        ..CreateOptions::dynamic(arguments.size)
    };
    create(&arguments.file, &options)?;
    Ok(Outcome::Fine)
}
