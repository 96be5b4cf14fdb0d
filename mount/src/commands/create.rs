//! `vhdfs create`.

use std::path::Path;
use std::sync::Arc;

use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, HostParents, OpenOptions};
use vhdfs::error::CreateError;
use vhdfs::format::{DiskType, Format};
use vhdfs::storage::host::paths;

use super::directory_of;
use crate::cli::{CreateArguments, NewDiskType, NewFormat};
use crate::text::say;
use crate::{Failure, Outcome, WrongUsage};

/// Runs the command.
pub(crate) fn run(arguments: &CreateArguments) -> Result<Outcome, Failure> {
    let file = &arguments.file;
    let disk_type = match (arguments.disk_type, &arguments.parent) {
        (Some(NewDiskType::Differencing), _) | (None, Some(_)) => DiskType::Differencing,
        (Some(_), Some(_)) => {
            return Err(WrongUsage("--parent is for --type differencing".to_owned()).into());
        }
        (Some(NewDiskType::Fixed), None) => DiskType::Fixed,
        (Some(NewDiskType::Dynamic) | None, None) => DiskType::Dynamic,
    };
    // Open, and so unchanged, until the child is there.
    let parent = match &arguments.parent {
        Some(path) => Some(open_parent(path, arguments)?),
        None => None,
    };
    let format = format(arguments, parent.as_deref())?;
    let mut options = match &parent {
        Some(parent) => CreateOptions {
            format,
            ..CreateOptions::differencing(parent.as_parent_of(file)?)
        },
        None => CreateOptions::new(format, disk_type, arguments.size.unwrap_or_default()),
    };
    options.size = arguments.size.unwrap_or(options.size);
    options.block_size = arguments.block_size.map(u32::try_from).transpose()?;
    options.sector_size = arguments.sector_size.unwrap_or(options.sector_size);
    create(file, &options).map_err(|error| match error {
        CreateError::Invalid { .. } => Failure::from(WrongUsage(error.to_string())),
        other => other.into(),
    })?;
    if let Some(parent) = &parent {
        advise(file, parent.path());
    }
    Ok(Outcome::Fine)
}

fn open_parent(path: &Path, arguments: &CreateArguments) -> Result<Arc<Disk>, Failure> {
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    // The new disk's directory counts, too: there the whole chain will be looked for.
    let mut directories = arguments.parents.directories.clone();
    directories.push(directory_of(&arguments.file).to_owned());
    let parents = HostParents::beside(path, &directories);
    Ok(Disk::open_with(path, &options, &parents)?)
}

/// The new disk's format. A name that promises another one would mislead whoever sees it.
fn format(arguments: &CreateArguments, parent: Option<&Disk>) -> Result<Format, Failure> {
    let file = arguments.file.display();
    let of_parent = match parent {
        Some(parent) => Some(parent.info()?.format),
        None => None,
    };
    let asked = arguments.format.map(|format| match format {
        NewFormat::Vhd => Format::Vhd,
        NewFormat::Vhdx => Format::Vhdx,
    });
    let extension = arguments.file.extension().unwrap_or_default();
    let is = |known: &[&str]| {
        known
            .iter()
            .any(|known| extension.eq_ignore_ascii_case(known))
    };
    let named = match () {
        () if is(&["vhd", "avhd"]) => Some(Format::Vhd),
        () if is(&["vhdx", "avhdx"]) => Some(Format::Vhdx),
        () => None,
    };
    let format = asked.or(named).or(of_parent).unwrap_or(Format::Vhd);
    if let Some(named) = named.filter(|named| *named != format) {
        let text = format!("{file}: the name is that of a {named}, not of a {format}");
        return Err(WrongUsage(text).into());
    }
    match of_parent {
        Some(other) if other != format => Err(format!(
            "{file}: a {format} over a {other} is not possible: name it .{other}"
        )
        .into()),
        _ => Ok(format),
    }
}

/// Says what it takes to open a child whose parent is not below its own directory.
fn advise(file: &Path, parent: &Path) {
    let directory = paths::canonical(directory_of(file));
    let (Ok(directory), Ok(parent)) = (directory, paths::canonical(parent)) else {
        return;
    };
    let is_below = paths::below(&directory, &parent).is_some();
    if let Some(needed) = parent.parent().filter(|_| !is_below) {
        say(&format!(
            "{}: the parent is not below {}: opening it takes --parent-dir {}",
            file.display(),
            directory.display(),
            needed.display()
        ));
    }
}
