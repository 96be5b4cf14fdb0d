//! `vhdfs info`.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::error::OpenProblem;
use vhdfs::format::DiskType;
use vhdfs::image::{self, Image, ImageOptions};
use vhdfs::storage::host::{HostFile, HostOptions};

use super::attach::{form_of, too_large};
use super::targets::{Target, Targets};
use super::{
    Report, about, children_of, count_of_children, explained_problem, for_each_file, listed, name,
};
use crate::cli::{InfoArguments, ParentArguments};
use crate::text::{Bytes, plain};
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
    sparse: bool,
    hole_bytes: u64,
    /// What of it Windows does not attach, and when; nothing where nothing is known that keeps it from that.
    windows_refuses: Vec<String>,
    block_size: u64,
    blocks_total: u64,
    blocks_allocated: u64,
    sector_size: u64,
    physical_sector_size: u64,
    /// `None` where the image does not say.
    creator: Option<String>,
    identity: String,
    /// The parent, its parent, and so on.
    parents: Vec<Ancestor>,
    /// Why the next one is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_error: Option<String>,
    children: Vec<String>,
    /// Files and directories that could not be read, where there may be more.
    children_unread: Vec<String>,
    /// There may be more children.
    #[serde(skip)]
    children_cut_off: bool,
    /// Other names of the file, beside which there may be more.
    #[serde(skip)]
    names_elsewhere: u64,
}

#[derive(Serialize)]
struct Ancestor {
    file: String,
    format: String,
    #[serde(rename = "type")]
    disk_type: &'static str,
    virtual_size: u64,
    identity: String,
}

/// Runs the command.
pub(crate) fn run(arguments: &InfoArguments) -> Result<Outcome, Failure> {
    let targets = Targets::of(&arguments.files, arguments.recursive);
    let tally = for_each_file(&targets, arguments.json, |target| {
        inspect(target, &arguments.parents)
    })?;
    Ok(tally.outcome())
}

fn inspect(target: &Target, parents: &ParentArguments) -> Result<Info, Failure> {
    let file = &*target.file;
    // Without a lock: a disk that is in use can be looked at.
    let options = OpenOptions {
        read_only: true,
        lock: false,
        ..OpenOptions::default()
    };
    let disk = match Disk::open_with(file, &options, &target.parents(parents)) {
        Ok(disk) => disk,
        // The file itself can be told of all the same.
        Err(error) => match error.problem() {
            OpenProblem::Parent(_) => {
                return inspect_alone(file, explained_problem(error.problem()));
            }
            _ => return Err(error.into()),
        },
    };
    let info = disk.info().map_err(|error| about(file, &error))?;
    let (sector_size, physical_sector_size) = disk.sector_sizes();
    let children = children_of(file, &disk);
    let ancestors = || std::iter::successors(disk.parent(), |disk| disk.parent());
    let (form, mut refused) = form_of(file, "the file")?;
    for parent in ancestors() {
        let path = parent.path();
        refused.extend(form_of(path, &format!("its parent {}", path.display()))?.1);
    }
    refused.extend(too_large(info.format, info.virtual_size));
    Ok(Info {
        file: name(file),
        format: info.format.to_string(),
        disk_type: type_name(info.disk_type),
        virtual_size: info.virtual_size,
        file_length: info.file_length,
        allocated_bytes: info.allocated_bytes,
        sparse: form.is_sparse,
        hole_bytes: form.hole_bytes,
        windows_refuses: refused,
        block_size: info.block_size,
        blocks_total: info.blocks_total,
        blocks_allocated: info.blocks_allocated,
        sector_size,
        physical_sector_size,
        creator: Some(info.creator).filter(|name| !name.is_empty()),
        identity: disk.identity().to_string(),
        parents: ancestors().map(ancestor).collect::<Result<_, _>>()?,
        parent_error: None,
        children: children.files.iter().map(|child| name(child)).collect(),
        children_unread: children.unread.iter().map(|path| name(path)).collect(),
        children_cut_off: children.cut_off,
        names_elsewhere: children.names_elsewhere,
    })
}

fn ancestor(disk: &Arc<Disk>) -> Result<Ancestor, Failure> {
    let info = disk.info().map_err(|error| about(disk.path(), &error))?;
    Ok(Ancestor {
        file: name(disk.path()),
        format: info.format.to_string(),
        disk_type: type_name(info.disk_type),
        virtual_size: info.virtual_size,
        identity: disk.identity().to_string(),
    })
}

/// What can be told of a differencing disk without its parent.
fn inspect_alone(file: &Path, parent_error: String) -> Result<Info, Failure> {
    let options = HostOptions {
        read_only: true,
        lock: false,
        no_follow: false,
    };
    let host = HostFile::open(file, &options)?;
    let allocated = vhdfs::storage::Storage::allocated_bytes(&host);
    let options = ImageOptions {
        read_only: true,
        punch_holes: false,
    };
    let opened = image::open(Arc::new(host), file, options);
    let image: Box<dyn Image> = opened.map_err(|error| about(file, &error))?.image;
    let geometry = image.geometry();
    let (form, mut refused) = form_of(file, "the file")?;
    refused.extend(too_large(geometry.format, geometry.disk_len));
    refused.push("a differencing disk without its parent".to_owned());
    Ok(Info {
        file: name(file),
        format: geometry.format.to_string(),
        disk_type: type_name(geometry.disk_type),
        virtual_size: geometry.disk_len,
        file_length: image.file_len(),
        allocated_bytes: allocated.map_err(|error| about(file, &error))?,
        sparse: form.is_sparse,
        hole_bytes: form.hole_bytes,
        windows_refuses: refused,
        block_size: geometry.block_size,
        blocks_total: u64::from(image.map().len()),
        blocks_allocated: image.map().present_count(),
        sector_size: geometry.sector_size,
        physical_sector_size: geometry.physical_sector_size,
        creator: Some(image.creator()).filter(|name| !name.is_empty()),
        identity: image.identity().to_string(),
        parents: Vec::new(),
        parent_error: Some(parent_error),
        children: Vec::new(),
        children_unread: Vec::new(),
        children_cut_off: false,
        names_elsewhere: 0,
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
        writeln!(
            out,
            "{}: {} {}",
            plain(&self.file),
            self.disk_type,
            self.format
        )?;
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
        let mut sectors = format!("{} bytes", self.sector_size);
        if self.physical_sector_size != self.sector_size {
            sectors.push_str(&format!(", physically {}", self.physical_sector_size));
        }
        let sparse = match (self.sparse, self.hole_bytes) {
            (false, 0) => "no".to_owned(),
            // Of what Windows does not call sparse, a part may all the same not be stored.
            (is_sparse, holes) => {
                let is_sparse = if is_sparse { "yes" } else { "no" };
                format!("{is_sparse}, {} of holes", Bytes(holes))
            }
        };
        let mut facts = vec![("sparse", sparse)];
        let refused = self.windows_refuses.iter();
        facts.extend(refused.map(|what| ("Windows", format!("does not attach {what}"))));
        if self.windows_refuses.is_empty() {
            facts.push(("Windows", "attaches it, as far as is known".to_owned()));
        }
        facts.extend([
            ("sectors", sectors),
            (
                "creator",
                self.creator.clone().unwrap_or_else(|| "unknown".to_owned()),
            ),
            ("identity", self.identity.clone()),
        ]);
        facts.extend(self.parents.iter().map(|parent| {
            let (kind, format) = (parent.disk_type, &parent.format);
            let (size, id) = (Bytes(parent.virtual_size), &parent.identity);
            let text = format!("{}: {kind} {format}, {size}, identity {id}", parent.file);
            ("parent", text)
        }));
        if let Some(error) = &self.parent_error {
            facts.push(("parent", error.clone()));
        }
        if !self.children.is_empty() {
            let count = count_of_children(self.children.len());
            let at_least = if self.children_cut_off {
                "at least "
            } else {
                ""
            };
            let text = format!("{at_least}{count} here: {}", listed(&self.children));
            facts.push(("parent of", text));
        }
        if !self.children_unread.is_empty() {
            let text = format!(
                "{}: disks over this one may be there",
                listed(&self.children_unread)
            );
            facts.push(("not readable", text));
        }
        if self.names_elsewhere > 0 {
            let text = format!(
                "{} (hard links) in places that were not searched: disks over this one may be there",
                self.names_elsewhere
            );
            facts.push(("other names", text));
        }
        for (what, text) in facts {
            writeln!(out, "  {what:<15} {}", plain(&text))?;
        }
        Ok(())
    }

    fn has_problems(&self) -> bool {
        self.parent_error.is_some()
    }
}
