//! `vhdfs info`.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::format::DiskType;

use super::{Report, about, for_each_file, name};
use crate::cli::InfoArguments;
use crate::text::Bytes;
use crate::{Failure, Outcome};

#[derive(Serialize)]
struct Info {
    file: String,
    format: String,
    #[serde(rename = "type")]
    disk_type: &'static str,
    virtual_size: u64,
    file_length: u64,
    allocated_bytes: u64,
    block_size: u64,
    blocks_total: u64,
    blocks_allocated: u64,
    creator: String,
}

/// Runs the command.
pub(crate) fn run(arguments: &InfoArguments) -> Result<Outcome, Failure> {
    for_each_file(&arguments.files, arguments.json, inspect)
}

fn inspect(file: &Path) -> Result<Info, Failure> {
    // Without a lock: a disk that is in use can be looked at.
    let options = OpenOptions {
        read_only: true,
        lock: false,
        ..OpenOptions::default()
    };
    let disk = Disk::open(file, &options)?;
    let info = disk.info().map_err(|error| about(file, &error))?;
    Ok(Info {
        file: name(file),
        format: info.format.to_string(),
        disk_type: type_name(info.disk_type),
        virtual_size: info.virtual_size,
        file_length: info.file_length,
        allocated_bytes: info.allocated_bytes,
        block_size: info.block_size,
        blocks_total: info.blocks_total,
        blocks_allocated: info.blocks_allocated,
        creator: info.creator,
    })
}

fn type_name(disk_type: DiskType) -> &'static str {
    match disk_type {
        DiskType::Fixed => "fixed",
        DiskType::Dynamic => "dynamic",
        DiskType::Differencing => "differencing",
    }
}

impl Report for Info {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}: {} {}", self.file, self.disk_type, self.format)?;
        let sizes = [
            ("virtual size", self.virtual_size),
            ("file length", self.file_length),
            ("stored on host", self.allocated_bytes),
        ];
        for (what, bytes) in sizes {
            writeln!(out, "  {what:<15} {:>11} ({bytes} bytes)", Bytes(bytes))?;
        }
        if self.block_size > 0 {
            writeln!(
                out,
                "  {:<15} {:>11} of {} used, {} each",
                "blocks",
                self.blocks_allocated,
                self.blocks_total,
                Bytes(self.block_size)
            )?;
        }
        writeln!(out, "  {:<15} {}", "creator", self.creator)
    }

    fn has_problems(&self) -> bool {
        false
    }
}
