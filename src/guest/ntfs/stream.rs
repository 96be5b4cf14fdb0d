//! The value of an attribute, wherever it lies.

use super::boot::Geometry;
use super::record::{Attribute, Value};
use super::runs::{Mapping, Run};
use super::{Trouble, View, damaged};
use crate::units::{u64_from, usize_from};

/// The value of an attribute, all parts of it found.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    /// The file's base record.
    owner: u64,
    /// Bytes of the value.
    pub(super) size: u64,
    /// Bytes of it that were ever written; the others read as zeros.
    pub(super) initialized: u64,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Resident(Vec<u8>),
    /// In the order of the value, without a gap.
    Clusters {
        runs: Vec<Run>,
        cluster_size: u64,
    },
}

impl Stream {
    /// The value whose first part, or all of it, `attribute` maps, of the file whose base record is
    /// `owner`.
    pub(super) fn begin(
        owner: u64,
        attribute: &Attribute<'_>,
        geometry: &Geometry,
    ) -> Result<Self, Trouble> {
        if !attribute.plain {
            return Err(wrong(owner, "is compressed or encrypted"));
        }
        let mapping = match attribute.value {
            Value::Resident(value) => {
                return Ok(Self {
                    owner,
                    size: u64_from(value.len()),
                    initialized: u64_from(value.len()),
                    content: Content::Resident(value.to_vec()),
                });
            }
            Value::NonResident(mapping) => mapping,
        };
        if mapping.lowest_vcn != 0 || mapping.initialized_size > mapping.data_size {
            return Err(wrong(owner, "has sizes that make no sense"));
        }
        let mut stream = Self {
            owner,
            size: mapping.data_size,
            initialized: mapping.initialized_size,
            content: Content::Clusters {
                runs: Vec::new(),
                cluster_size: geometry.cluster_size,
            },
        };
        stream.extend(&mapping, geometry)?;
        Ok(stream)
    }

    /// Adds the part that `mapping` maps, which must be the next.
    pub(super) fn extend(
        &mut self,
        mapping: &Mapping<'_>,
        geometry: &Geometry,
    ) -> Result<(), Trouble> {
        let next = self.clusters();
        let Content::Clusters { runs, .. } = &mut self.content else {
            return Err(wrong(self.owner, "lies in a record and in clusters"));
        };
        if mapping.lowest_vcn != next {
            return Err(wrong(self.owner, "lacks a part"));
        }
        for run in mapping.runs(geometry.clusters) {
            runs.push(run?);
        }
        // A hole may be of any length.
        match self.clusters().checked_mul(geometry.cluster_size) {
            Some(_) => Ok(()),
            None => Err(wrong(self.owner, "is longer than it can be")),
        }
    }

    /// Checks that the value is as long as it says: `allocated` bytes of clusters.
    pub(super) fn finish(self, allocated: u64) -> Result<Self, Trouble> {
        if let Content::Clusters { cluster_size, .. } = &self.content {
            let mapped = self.clusters().checked_mul(*cluster_size);
            if mapped != Some(allocated) || self.size > allocated {
                return Err(wrong(self.owner, "is not as long as it says"));
            }
        }
        Ok(self)
    }

    /// Clusters of the value that are mapped so far.
    fn clusters(&self) -> u64 {
        match &self.content {
            Content::Resident(_) => 0,
            Content::Clusters { runs, .. } => runs.last().map_or(0, |run| run.vcns.end),
        }
    }

    /// The cluster of the volume that holds the first of the value.
    pub(super) fn first_lcn(&self) -> Option<u64> {
        match &self.content {
            Content::Resident(_) => None,
            Content::Clusters { runs, .. } => runs.first()?.lcn,
        }
    }

    /// Whether any of the value is a hole.
    pub(super) fn has_holes(&self) -> bool {
        match &self.content {
            Content::Resident(_) => false,
            Content::Clusters { runs, .. } => runs.iter().any(|run| run.lcn.is_none()),
        }
    }

    /// Whether any of the value is a hole or was never written.
    pub(super) fn is_sparse(&self) -> bool {
        self.has_holes() || self.initialized < self.size
    }

    /// Fills `buf` from `offset` of the value on.
    pub(super) fn read_at(
        &self,
        view: &View<'_>,
        buf: &mut [u8],
        offset: u64,
    ) -> Result<(), Trouble> {
        let end = offset.checked_add(u64_from(buf.len()));
        let Some(end) = end.filter(|end| *end <= self.size) else {
            return Err(wrong(self.owner, "ends too early"));
        };
        let (buf, zeros) =
            buf.split_at_mut(usize_from(end.min(self.initialized.max(offset)) - offset));
        zeros.fill(0);
        match &self.content {
            Content::Resident(value) => {
                let start = usize_from(offset);
                buf.copy_from_slice(&value[start..start + buf.len()]);
                Ok(())
            }
            Content::Clusters { runs, cluster_size } => {
                let missing = || wrong(self.owner, "ends too early");
                read_runs(view, runs, *cluster_size, buf, offset, missing)
            }
        }
    }

    /// Reads all of the value, of which there must be at most `limit` bytes.
    pub(super) fn read_all(&self, view: &View<'_>, limit: u64) -> Result<Vec<u8>, Trouble> {
        if self.size > limit {
            return Err(wrong(self.owner, "is longer than it can be"));
        }
        self.read_first(view, self.size)
    }

    /// Reads the first `len` bytes of the value.
    pub(super) fn read_first(&self, view: &View<'_>, len: u64) -> Result<Vec<u8>, Trouble> {
        // Holes take no place on the disk, but would take memory here.
        if len > self.size || len > view.len() {
            return Err(wrong(self.owner, "is not as long as it says"));
        }
        let mut bytes = vec![0; usize_from(len)];
        let mut offset = 0;
        for piece in bytes.chunks_mut(PIECE) {
            self.read_at(view, piece, offset)?;
            offset += u64_from(piece.len());
        }
        Ok(bytes)
    }
}

fn wrong(owner: u64, how: &str) -> Trouble {
    damaged(format!("metadata of record {owner} {how}"))
}

/// Bytes that are read at a time: what is read later to see whether it changed takes as much memory.
pub(super) const PIECE: usize = 4 << 20;

fn read_runs(
    view: &View<'_>,
    runs: &[Run],
    cluster_size: u64,
    buf: &mut [u8],
    offset: u64,
    missing: impl Fn() -> Trouble,
) -> Result<(), Trouble> {
    let mut index = runs.partition_point(|run| run.vcns.end <= offset / cluster_size);
    let (mut rest, mut offset) = (buf, offset);
    while !rest.is_empty() {
        let run = runs.get(index).ok_or_else(&missing)?;
        let left = (run.vcns.end * cluster_size).saturating_sub(offset);
        let len = usize_from(left.min(u64_from(rest.len())));
        let (part, tail) = rest.split_at_mut(len);
        match run.lcn {
            Some(lcn) => {
                let from = lcn * cluster_size + (offset - run.vcns.start * cluster_size);
                view.read_at(part, from)?;
            }
            None => part.fill(0),
        }
        offset += u64_from(len);
        rest = tail;
        index += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::ntfs::tests::build::Image;

    #[test]
    fn any_part_of_any_run() {
        let bytes: Vec<u8> = (0..16 * 512_u32)
            .map(|at| (at / 7).to_le_bytes()[0] | 1)
            .collect();
        let disk = Image { bytes };
        let view = View::whole(&disk);
        // Backward, a hole, forward; the last bytes were never written.
        let places = [
            (0..3, Some(9)),
            (3..4, Some(2)),
            (4..6, None),
            (6..9, Some(12)),
        ];
        let run = |(vcns, lcn)| Run { vcns, lcn };
        let stream = Stream {
            owner: 7,
            size: 9 * 512 - 100,
            initialized: 8 * 512 + 10,
            content: Content::Clusters {
                runs: places.clone().into_iter().map(run).collect(),
                cluster_size: 512,
            },
        };
        let mut whole = Vec::new();
        for (vcns, lcn) in places {
            let len = usize_from((vcns.end - vcns.start) * 512);
            match lcn {
                Some(lcn) => whole.extend_from_slice(&disk.bytes[usize_from(lcn * 512)..][..len]),
                None => whole.resize(whole.len() + len, 0),
            }
        }
        whole.truncate(usize_from(stream.size));
        whole[usize_from(stream.initialized)..].fill(0);
        for start in (0..whole.len()).step_by(37) {
            for len in [0, 1, 511, 512, 513, 2000, 4000] {
                let mut buf = vec![0xee; len];
                let found = stream.read_at(&view, &mut buf, u64_from(start));
                match whole.get(start..start + len) {
                    Some(expected) => assert!(found.is_ok() && buf == expected, "{len} at {start}"),
                    None => assert!(found.is_err(), "{len} at {start}"),
                }
            }
        }
        assert!(stream.read_at(&view, &mut [0], u64::MAX).is_err());
        assert_eq!(stream.read_all(&view, stream.size).unwrap(), whole);
        assert!(stream.read_all(&view, stream.size - 1).is_err());
    }
}
