//! What a description of a volume group comes to. [lvm2 lib/format_text/import_vsn1.c, flags.c]

use std::collections::BTreeMap;
use std::ops::Range;

use rangemap::RangeSet;

use super::label::{PhysicalVolume, SECTOR};
use super::text::{self, Node, Section, Value};
use super::{Group, LogicalVolume};
use crate::guest::Trouble;
use crate::units::u64_from;

/// Pieces of a volume: every access to it looks for the right one among them.
const MAX_PIECES: usize = 1024;

/// The extents of a physical volume.
struct Extents {
    /// The name of the physical volume in this description.
    name: String,
    /// Bytes of an extent.
    size: u64,
    /// Where the first one starts.
    start: u64,
    /// How many there are.
    count: u64,
    /// Those that volumes have.
    taken: RangeSet<u64>,
}

impl Extents {
    /// Takes `count` extents from `first` on and gives their bytes; `None` where they are not there or
    /// taken.
    fn take(&mut self, first: u64, count: u64) -> Option<Range<u64>> {
        let range = first..first.checked_add(count).filter(|end| *end <= self.count)?;
        if range.is_empty() || self.taken.overlaps(&range) {
            return None;
        }
        self.taken.insert(range.clone());
        Some(self.bytes(&range))
    }

    /// The bytes of a range of extents; that they all lie on the part was checked.
    fn bytes(&self, range: &Range<u64>) -> Range<u64> {
        self.start + range.start * self.size..self.start + range.end * self.size
    }
}

fn unclear(what: &str) -> Trouble {
    Trouble::skip(format!("has metadata without {what}"))
}

/// Makes sense of the text of `volume`, which lies in a part of `len` bytes.
///
/// # Errors
/// [`Trouble::Skip`] where anything of it is in doubt.
pub(super) fn read(len: u64, volume: &PhysicalVolume) -> Result<Group, Trouble> {
    let all = text::parse(&volume.text)?;
    let known = text::text(&all, "contents") == Some("Text Format Volume Group")
        && text::number(&all, "version") == Some(1);
    let mut groups = all.iter().filter_map(|(name, node)| match node {
        Node::Section(group) => Some((name, group)),
        Node::Values(_) => None,
    });
    let (Some((name, group)), None, true) = (groups.next(), groups.next(), known) else {
        return Err(Trouble::skip("has metadata of a kind that is not known"));
    };
    named(name)?;
    allowed(name, group)?;
    let mut extents = extents(len, volume, group)?;
    let nothing = Section::new();
    let volumes = text::section(group, "logical_volumes").unwrap_or(&nothing);
    let volumes = logical(volumes, &mut extents)?;
    let unused = (extents.taken.gaps(&(0..extents.count)))
        .map(|range| extents.bytes(&range))
        .collect();
    Ok(Group {
        name: name.clone(),
        volumes,
        unused,
    })
}

/// That a name is one that LVM2 gives, so that it can be shown.
fn named(name: &str) -> Result<(), Trouble> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"+_.-".contains(&byte);
    if name.len() <= 128 && name.bytes().all(good) {
        return Ok(());
    }
    Err(Trouble::skip("has metadata with a name that cannot be"))
}

/// That nothing about the group forbids to read it.
fn allowed(name: &str, group: &Section) -> Result<(), Trouble> {
    const SECTIONS: [&str; 3] = [
        "physical_volumes",
        "logical_volumes",
        "historical_logical_volumes",
    ];
    for (key, node) in group {
        if matches!(node, Node::Section(_)) && !SECTIONS.contains(&key.as_str()) {
            return Err(Trouble::skip(format!(
                "has metadata with a section {key} that is not known"
            )));
        }
    }
    for flag in flags(group)? {
        match flag {
            "RESIZEABLE" | "READ" | "WRITE" | "WRITE_LOCKED" | "NOAUTOACTIVATE" => {}
            "EXPORTED" => {
                return Err(Trouble::skip(format!(
                    "belongs to the volume group {name}, which is exported: vgimport takes it back"
                )));
            }
            "CLUSTERED" | "SHARED" => return Err(shared(name)),
            other => return Err(unknown(name, other)),
        }
    }
    match group.contains_key("lock_type") && text::text(group, "lock_type") != Some("none") {
        true => Err(shared(name)),
        false => Ok(()),
    }
}

fn shared(name: &str) -> Trouble {
    Trouble::skip(format!(
        "belongs to the volume group {name}, which several systems share"
    ))
}

fn unknown(whose: &str, flag: &str) -> Trouble {
    let flag = shown(flag);
    Trouble::skip(format!(
        "has the flag {flag} on {whose}, which is not known"
    ))
}

/// What can be shown of a word from the disk.
fn shown(word: &str) -> String {
    word.chars()
        .filter(char::is_ascii_graphic)
        .take(40)
        .collect()
}

/// The status and the flags of anything.
fn flags(of: &Section) -> Result<Vec<&str>, Trouble> {
    let mut all = text::texts(of, "status").ok_or_else(|| unclear("a status"))?;
    if of.contains_key("flags") {
        all.extend(text::texts(of, "flags").ok_or_else(|| unclear("flags"))?);
    }
    Ok(all)
}

/// The extents of the group's one physical volume.
fn extents(len: u64, volume: &PhysicalVolume, group: &Section) -> Result<Extents, Trouble> {
    let all = text::section(group, "physical_volumes").ok_or_else(|| unclear("its disks"))?;
    let mut all = all.iter();
    let (Some((name, Node::Section(own))), None) = (all.next(), all.next()) else {
        return Err(Trouble::skip(
            "belongs to a volume group that has other disks as well",
        ));
    };
    let uuid: String = (text::text(own, "id").unwrap_or_default().chars())
        .filter(|c| *c != '-')
        .collect();
    if uuid != volume.uuid {
        return Err(Trouble::skip(
            "belongs to a volume group that knows nothing of it: it has another disk's metadata",
        ));
    }
    for flag in flags(own)? {
        match flag {
            "ALLOCATABLE" => {}
            "MISSING" => return Err(Trouble::skip("is taken for missing by its volume group")),
            "EXPORTED" => return Err(Trouble::skip("belongs to a volume group that is exported")),
            other => return Err(unknown(name, other)),
        }
    }
    let number = |key: &'static str| text::number(own, key).ok_or_else(|| unclear(key));
    let bytes = |sectors: u64| sectors.checked_mul(SECTOR);
    let size = text::number(group, "extent_size")
        .and_then(bytes)
        .filter(|size| *size > 0);
    let extents = Extents {
        name: name.clone(),
        size: size.ok_or_else(|| unclear("a size of extents"))?,
        start: bytes(number("pe_start")?).ok_or_else(|| unclear("a place of extents"))?,
        count: number("pe_count")?,
        taken: RangeSet::new(),
    };
    let device = match own.contains_key("dev_size") {
        true => bytes(number("dev_size")?).unwrap_or(u64::MAX),
        false => volume.device_size,
    };
    let end = (extents.count.checked_mul(extents.size))
        .and_then(|bytes| bytes.checked_add(extents.start))
        .filter(|end| *end <= device && device <= len && volume.device_size <= len);
    let Some(end) = end else {
        return Err(Trouble::skip(format!(
            "claims more than the {len} bytes that it has"
        )));
    };
    if extents.start != volume.data_start {
        return Err(Trouble::skip("has a label and metadata that disagree"));
    }
    let boot = match own.contains_key("ba_start") {
        true => {
            let start = bytes(number("ba_start")?).ok_or_else(|| unclear("ba_start"))?;
            let size = bytes(number("ba_size")?).ok_or_else(|| unclear("ba_size"))?;
            Some(start..start.saturating_add(size))
        }
        false => None,
    };
    let clear = |range: &Range<u64>| range.end <= extents.start || range.start >= end;
    if !volume.reserved.iter().chain(&boot).all(clear) {
        return Err(Trouble::skip("has extents where its metadata lies"));
    }
    Ok(extents)
}

/// The volumes that have extents, which they take.
fn logical(all: &Section, extents: &mut Extents) -> Result<Vec<LogicalVolume>, Trouble> {
    let parents = parents(all);
    let mut volumes = Vec::new();
    for (name, node) in all {
        let Node::Section(own) = node else {
            return Err(unclear("the volumes it names"));
        };
        named(name)?;
        let mut volume = volume(name, own, extents)?;
        if let Some((parent, kind)) = parents.get(name.as_str()) {
            let kind = shown(kind);
            volume.kept = Some(format!("belongs to {parent}, which is of the kind {kind}"));
        }
        if !volume.ranges.is_empty() {
            volumes.push(volume);
        }
    }
    Ok(volumes)
}

/// The names of volumes that others are made of, with the other's name and kind. Takes every string in
/// a segment for such a name, whatever it is for, which is more rather than less.
fn parents(all: &Section) -> BTreeMap<&str, (&str, &str)> {
    let mut found = BTreeMap::new();
    for (name, node) in all {
        let Node::Section(volume) = node else {
            continue;
        };
        for segment in volume.values() {
            let Node::Section(segment) = segment else {
                continue;
            };
            let kind = text::text(segment, "type").unwrap_or("unknown");
            let mut rest: Vec<&Node> = segment.values().collect();
            while let Some(node) = rest.pop() {
                match node {
                    Node::Section(inner) => rest.extend(inner.values()),
                    Node::Values(values) => {
                        found.extend(values.iter().filter_map(|value| match value {
                            Value::Text(text) => Some((text.as_str(), (name.as_str(), kind))),
                            _ => None,
                        }))
                    }
                }
            }
        }
    }
    found
}

/// One volume, whose extents are taken.
fn volume(name: &str, own: &Section, extents: &mut Extents) -> Result<LogicalVolume, Trouble> {
    let mut kept = None;
    let mut visible = false;
    for flag in flags(own)? {
        match flag {
            "READ" | "WRITE" | "FIXED_MINOR" | "WRITE_LOCKED" | "ACTIVATION_SKIP"
            | "NOAUTOACTIVATE" => {}
            "VISIBLE" => visible = true,
            "PVMOVE" | "LOCKED" => {
                kept = Some("is being moved: let pvmove finish".to_owned());
            }
            other => {
                kept = Some(format!("has the flag {}", shown(other)));
            }
        }
    }
    if !visible && kept.is_none() {
        kept = Some("is for LVM2's own use".to_owned());
    }
    let segments: Vec<&Section> = (own.values())
        .filter_map(|node| match node {
            Node::Section(segment) => Some(segment),
            Node::Values(_) => None,
        })
        .collect();
    if text::number(own, "segment_count") != Some(u64_from(segments.len())) {
        return Err(Trouble::skip(format!(
            "has metadata in which segments of volume {name} are missing"
        )));
    }
    let mut pieces = Vec::new();
    let mut linear = true;
    for segment in segments {
        match mapped(name, segment, extents)? {
            Mapped::Linear(piece) => pieces.push(piece),
            Mapped::Other(ranges, kind) => {
                linear = false;
                kept = Some(format!("is of the kind {kind}, which is not read here"));
                pieces.extend(ranges);
            }
        }
    }
    pieces.sort_by_key(|piece| piece.first);
    let mut next = 0;
    for piece in pieces.iter().filter(|_| linear) {
        if piece.first != next {
            return Err(Trouble::skip(format!(
                "has metadata in which volume {name} has a gap"
            )));
        }
        next = piece.first.saturating_add(piece.count);
    }
    if linear && pieces.len() > MAX_PIECES {
        linear = false;
        kept = Some(format!("lies in more than {MAX_PIECES} pieces"));
    }
    Ok(LogicalVolume {
        name: name.to_owned(),
        linear,
        ranges: pieces.into_iter().map(|piece| piece.range).collect(),
        kept,
    })
}

/// A run of extents of a volume.
struct Piece {
    /// The volume's extent that it starts with.
    first: u64,
    /// How many extents.
    count: u64,
    /// Its bytes on the physical volume.
    range: Range<u64>,
}

/// What a segment of a volume is made of.
enum Mapped {
    /// One run.
    Linear(Piece),
    /// Something else, which has these runs, and its name.
    Other(Vec<Piece>, String),
}

/// What `segment` of the volume `name` is made of; its extents are taken.
fn mapped(name: &str, segment: &Section, extents: &mut Extents) -> Result<Mapped, Trouble> {
    let unclear = |what: &str| {
        Trouble::skip(format!(
            "has metadata that is not clear about {what} of volume {name}"
        ))
    };
    let number = |key: &'static str| text::number(segment, key).ok_or_else(|| unclear(key));
    let kind = text::text(segment, "type").ok_or_else(|| unclear("the type"))?;
    let (first, count) = (number("start_extent")?, number("extent_count")?);
    let shown = shown(kind);
    if !matches!(kind, "striped" | "linear") {
        // It is made of other volumes, which have the extents. Unless it is of a kind that has its own.
        let direct = segment.values().any(|node| match node {
            Node::Values(values) => values.contains(&Value::Text(extents.name.clone())),
            Node::Section(_) => false,
        });
        return match direct {
            true => Err(Trouble::skip(format!(
                "has a volume {name} of the kind {shown}, which is not read here"
            ))),
            false => Ok(Mapped::Other(Vec::new(), shown)),
        };
    }
    let stripes = number("stripe_count")?;
    let areas = text::list(segment, "stripes").ok_or_else(|| unclear("the stripes"))?;
    let (areas, rest) = areas.as_chunks::<2>();
    let each = count
        .checked_div(stripes)
        .filter(|each| each * stripes == count);
    let each = each.ok_or_else(|| unclear("the stripes"))?;
    if !rest.is_empty() || u64_from(areas.len()) != stripes {
        return Err(unclear("the stripes"));
    }
    let mut pieces = Vec::new();
    let mut stacked = false;
    for area in areas {
        let (Value::Text(on), Value::Number(at)) = (&area[0], &area[1]) else {
            return Err(unclear("the stripes"));
        };
        if *on != extents.name {
            stacked = true;
            continue;
        }
        let range = (u64::try_from(*at).ok()).and_then(|at| extents.take(at, each));
        pieces.push(Piece {
            first,
            count,
            range: range.ok_or_else(|| unclear("the extents, which others have or nobody,"))?,
        });
    }
    match (pieces.pop(), stacked) {
        (Some(piece), false) if pieces.is_empty() => Ok(Mapped::Linear(piece)),
        (last, _) => {
            pieces.extend(last);
            let kind = if stacked { "stacked" } else { "striped" };
            Ok(Mapped::Other(pieces, kind.to_owned()))
        }
    }
}
