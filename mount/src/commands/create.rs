//! `vhdfs create`.

use std::path::Path;
use std::sync::Arc;

use vhdfs::create::{CreateOptions, create};
use vhdfs::disk::{Disk, HostParents, OpenOptions, give_identity};
use vhdfs::error::CreateError;
use vhdfs::format::parent::NewParent;
use vhdfs::format::{DiskType, Format};

use super::{advise_about_place, directory_of};
use crate::cli::{CreateArguments, NewDiskType, NewFormat};
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
        Some(path) => Some(adopt(path, arguments)?),
        None => None,
    };
    let format = format(arguments, parent.as_ref().map(|(disk, _)| &**disk))?;
    let mut options = match &parent {
        Some((_, parent)) => CreateOptions {
            format,
            ..CreateOptions::differencing(parent.clone())
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
    if let Some((parent, _)) = &parent {
        advise_about_place(file, parent.path());
    }
    Ok(Outcome::Fine)
}

/// The disk at `path`, open, and what the new one says of it.
fn adopt(path: &Path, arguments: &CreateArguments) -> Result<(Arc<Disk>, NewParent), Failure> {
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    // The new disk's directory counts, too: there the whole chain will be looked for.
    let mut directories = arguments.parents.directories.clone();
    directories.push(directory_of(&arguments.file).to_owned());
    let parents = || HostParents::beside(path, &directories);
    let open = || Disk::open_with(path, &options, &parents());
    let mut disk = open()?;
    let mut parent = disk.as_parent_of(&arguments.file);
    if arguments.give_identity && matches!(parent, Err(CreateError::ParentIdentity { .. })) {
        drop(disk);
        give_identity(path, &parents())?;
        disk = open()?;
        parent = disk.as_parent_of(&arguments.file);
    }
    match parent {
        Ok(parent) => Ok((disk, parent)),
        Err(error @ CreateError::ParentIdentity { .. }) => {
            Err(format!("{error} (--give-identity does that)").into())
        }
        Err(error) => Err(error.into()),
    }
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
