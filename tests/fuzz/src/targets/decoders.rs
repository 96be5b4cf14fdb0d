//! The decoders of `format`: any bytes are decoded or refused, and what is decoded is what is encoded.

use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use tempfile::TempDir;
use uuid::Uuid;
use vhdfs::disk::HostParents;
use vhdfs::format::foreign_path::ForeignPath;
use vhdfs::format::parent::{Identity, ParentLink, ParentPath, PathKind};
use vhdfs::format::sector_bitmap::{BitOrder, SectorBitmap};
use vhdfs::format::vhd::{self, DynamicHeader, Footer, Locator, Platform};
use vhdfs::format::vhdx::log::{Change, LogEntry, LogSource, Page, active_sequence, read_entry};
use vhdfs::format::vhdx::metadata::{
    FileParameters, MetadataTable, parse_disk_len, parse_sector_size,
};
use vhdfs::format::vhdx::{
    BatEntry, BatGeometry, BatSlot, Header, ParentLocator, REGION_TABLE_LEN, RegionTable,
    choose_header,
};
use vhdfs::format::xen::BatmapHeader;
use vhdfs::units::{BlockIndex, FileOffset, FileRange, u64_from, usize_from};

use super::input::Input;
use super::seal;

/// Footer, header, table entries, sector bitmaps and Xen's batmap of a VHD.
pub(super) fn vhd(data: &[u8]) {
    let mut input = Input::new(data);
    let (kind, sealed) = (input.byte(), input.byte() & 1 == 1);
    match kind % 5 {
        0 => {
            let mut bytes: [u8; 512] = input.structure();
            if sealed {
                seal::vhd(&mut bytes, seal::FOOTER_FIELD);
            }
            match Footer::parse(&bytes) {
                Ok(footer) => {
                    assert_eq!(Footer::parse(&footer.to_bytes()), Ok(footer));
                    let _ = (footer.disk_type(), footer.geometry().disk_len());
                    let _ = (footer.creator_text(), footer.has_saved_state());
                }
                Err(fault) => drop(fault.into_error("here").to_string()),
            }
        }
        1 => {
            let mut bytes: [u8; 1024] = input.structure();
            if sealed {
                bytes[..8].copy_from_slice(b"cxsparse");
                bytes[24..28].copy_from_slice(&[0, 1, 0, 0]);
                seal::vhd(&mut bytes, seal::HEADER_FIELD);
            }
            if let Ok(header) = DynamicHeader::parse(&bytes, FileOffset::new(512)) {
                let text = input.rest();
                let _ = (header.table_range(), header.locator_ranges().count());
                for locator in header.locators() {
                    let _ = locator.decode(text);
                }
                let _ = header.parent_name();
                DynamicHeader::parse(&header.to_bytes(), FileOffset::new(512))
                    .expect("what was written is read");
            }
        }
        2 => {
            while !input.is_empty() {
                let entry = input.structure();
                let slot = vhd::decode_bat_entry(entry);
                assert_eq!(vhd::encode_bat_entry(slot), entry);
            }
        }
        3 => bitmap(&mut input),
        _ => {
            let header = input.structure();
            if let Some(batmap) = BatmapHeader::parse(&header, FileOffset::new(512)) {
                let _ = (batmap.map_range(), batmap.fits(input.rest()));
                BatmapHeader::parse(&batmap.emptied(), FileOffset::new(512)).expect("still one");
            }
        }
    }
}

/// A bitmap against a look at each bit.
fn bitmap(input: &mut Input<'_>) {
    let order = *input.one_of(&[BitOrder::MsbFirst, BitOrder::LsbFirst]);
    let (sectors, from, to) = (u64::from(input.u16()), input.u16(), input.u16());
    let bytes = input.rest();
    let mut bitmap = SectorBitmap::new(bytes.into(), sectors, order);
    let same_until = |bitmap: &SectorBitmap, at: u64| {
        let first = bitmap.is_written(at);
        let end = (at + 1..sectors).find(|sector| bitmap.is_written(*sector) != first);
        end.unwrap_or(sectors)
    };
    let mut at = 0;
    while at < sectors {
        let end = bitmap.run_end(at, sectors);
        assert_eq!(end, same_until(&bitmap, at), "the run at {at} of {sectors}");
        at = end;
    }
    let (first, end) = (u64::from(from), u64::from(to));
    let before = bitmap.clone();
    bitmap.set(first, end);
    for sector in 0..sectors.min(u64_from(bytes.len()) * 8) {
        let expected = before.is_written(sector) || (first..end).contains(&sector);
        assert_eq!(bitmap.is_written(sector), expected, "sector {sector}");
    }
}

/// Headers, region table, metadata and block table of a VHDX.
pub(super) fn vhdx(data: &[u8]) {
    let mut input = Input::new(data);
    let (kind, sealed) = (input.byte(), input.byte() & 1 == 1);
    match kind % 4 {
        0 => {
            let mut headers = [[0_u8; 4096]; 2];
            for bytes in &mut headers {
                bytes[..96].copy_from_slice(&input.structure::<96>());
                if sealed {
                    seal::vhdx(bytes);
                }
            }
            let [first, second] = headers.map(|bytes| Header::parse(&bytes));
            if let Ok(header) = &first {
                assert_eq!(Header::parse(&header.to_bytes()).as_ref(), Ok(header));
            }
            if let Ok(current) = choose_header(first, second) {
                let _ = current.header.log_range();
            }
        }
        1 => {
            let mut bytes = vec![0; usize_from(REGION_TABLE_LEN)];
            let own = input.bytes(REGION_TABLE_LEN);
            bytes[..own.len()].copy_from_slice(own);
            if sealed {
                seal::vhdx(&mut bytes);
            }
            if let Ok(table) = RegionTable::parse(&bytes, FileOffset::new(192 << 10)) {
                let _ = table.check().map_err(|error| error.to_string());
                let _: Vec<String> = table.regions().iter().map(|region| region.name()).collect();
            }
        }
        2 => {
            let region_len = u64::from(input.u32());
            let mut bytes = vec![0; 64 << 10];
            let own = input.bytes(64 << 10);
            bytes[..own.len()].copy_from_slice(own);
            if let Ok(table) = MetadataTable::parse(&bytes, region_len) {
                let _ = table.oddities();
                for item in table.items() {
                    assert!(item.end() <= region_len.max(item.end().min(64 << 10)));
                }
            }
        }
        _ => block_table(&mut input),
    }
}

fn block_table(input: &mut Input<'_>) {
    if let Ok(parameters) = FileParameters::parse(input.structure()) {
        assert_eq!(FileParameters::parse(parameters.to_bytes()), Ok(parameters));
    }
    let entry = BatEntry::from_bytes(input.structure());
    assert_eq!(BatEntry::from_bytes(entry.to_bytes()), entry);
    let _ = (entry.payload_state(), entry.offset(), entry.reserved());
    let Ok(sector_size) = parse_sector_size(input.structure(), "sector size") else {
        return;
    };
    let Ok(disk_len) = parse_disk_len(input.structure(), sector_size) else {
        return;
    };
    let geometry = BatGeometry {
        block_size: 1 << (20 + input.byte() % 9),
        sector_size,
        disk_len,
        differencing: input.byte() & 1 == 1,
    };
    let block = BlockIndex::new(input.u32() % geometry.blocks());
    let index = geometry.payload_index(block);
    assert_eq!(geometry.slot(index), BatSlot::Payload(block));
    assert!(index < geometry.entries());
    let chunk = geometry.chunk_of(block);
    assert!(geometry.blocks_of(chunk).any(|own| own == block));
    let bits = geometry.bits_of(block, FileOffset::new(0));
    assert!(bits.end().get() <= 1 << 20);
}

/// A log in memory.
struct Log {
    bytes: Vec<u8>,
    reads: u64,
}

impl LogSource for Log {
    type Error = Infallible;

    fn len(&self) -> u64 {
        u64_from(self.bytes.len())
    }

    fn read(&mut self, at: u64, sector: &mut Page) -> Result<(), Infallible> {
        self.reads += 1;
        sector.copy_from_slice(&self.bytes[usize_from(at)..][..4096]);
        Ok(())
    }

    fn next_data(&mut self, at: u64) -> Result<Option<u64>, Infallible> {
        Ok((at < self.len()).then_some(at))
    }
}

/// The log of a VHDX: entries of any bytes with right checksums, in a ring of any length.
pub(super) fn log(data: &[u8]) {
    let mut input = Input::new(data);
    let guid = Uuid::from_bytes([0x10; 16]);
    let sectors = u64::from(input.byte() % 32) + 1;
    let mut log = Log {
        bytes: vec![0; usize_from(sectors * 4096)],
        reads: 0,
    };
    // A well-formed entry, then whatever the input says.
    let changes = (0..input.byte() % 4).map(|n| match n % 2 {
        0 => Change::Page {
            at: FileOffset::new(u64::from(n) << 20),
            bytes: Arc::new([n; 4096]),
        },
        _ => Change::Zeros(FileRange::new(FileOffset::new(4096), 8192)),
    });
    let entry = LogEntry {
        sequence_number: u64::from(input.byte()) + 1,
        tail: 0,
        log_guid: guid,
        flushed_file_offset: 1 << 20,
        last_file_offset: 2 << 20,
        changes: changes.collect(),
    };
    let encoded = entry.encode();
    if encoded.len() <= log.bytes.len() {
        log.bytes[..encoded.len()].copy_from_slice(&encoded);
        let Ok(read) = read_entry(&mut log, guid, 0, |_| {});
        let header = read.expect("what was written is read");
        assert_eq!(header.descriptor_count, u64_from(entry.changes.len()));
    }
    while !input.is_empty() {
        let at = usize::from(input.u16()) % log.bytes.len();
        let part = input.bytes(32);
        let end = (at + part.len()).min(log.bytes.len());
        log.bytes[at..end].copy_from_slice(&part[..end - at]);
    }
    seal::log_entries(&mut log.bytes);
    log.reads = 0;
    let Ok(sequence) = active_sequence(&mut log, guid);
    // Each sector as the start of an entry, which is read to its end.
    assert!(log.reads <= sectors * (sectors + 1), "{} reads", log.reads);
    for at in sequence.iter().flat_map(|sequence| &sequence.entries) {
        let Ok(read) = read_entry(&mut log, guid, *at, |_| {});
        assert!(read.is_some(), "an entry of the sequence is valid");
    }
}

/// A parent, a link to what lies outside, and a child that looks for its parent among them.
static FAMILY: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let inside = folder.path().join("inside");
    std::fs::create_dir_all(inside.join("deep")).expect("a folder");
    let options = vhdfs::create::CreateOptions::dynamic(1 << 20);
    for name in ["outside.vhd", "inside/base.vhd", "inside/deep/base.vhd"] {
        vhdfs::create::create(&folder.path().join(name), &options).expect("a disk");
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink("..", inside.join("up")).expect("a link");
    folder
});

/// What a child says of its parent: locators of both formats, and where they lead on this host.
pub(super) fn locators(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.byte();
    let paths = if kind & 1 == 0 {
        let platform = *input.one_of(&[
            Platform::RelativeUtf16,
            Platform::AbsoluteUtf16,
            Platform::RelativeAnsi,
            Platform::AbsoluteAnsi,
            Platform::MacUrl,
        ]);
        let data = FileRange::new(FileOffset::new(0), 0);
        let path = Locator { platform, data }.decode(input.rest());
        path.into_iter().collect()
    } else if kind & 2 == 0 {
        let Ok(locator) = ParentLocator::parse(input.rest()) else {
            return;
        };
        let again = ParentLocator::parse(&locator.to_bytes());
        assert_eq!(again.as_ref().ok(), Some(&locator), "as it was written");
        locator
            .link()
            .map_or_else(|_| Vec::new(), |link| link.paths)
    } else {
        let kind = *input.one_of(&[PathKind::Relative, PathKind::Absolute, PathKind::Volume]);
        let text = String::from_utf8_lossy(input.rest()).into_owned();
        vec![ParentPath { kind, text }]
    };
    for path in &paths {
        if let Some(foreign) = ForeignPath::parse(&path.text) {
            let odd = |name: &String| name.is_empty() || name == "." || name == "..";
            assert!(!foreign.names.iter().any(odd), "{foreign:?}");
        }
    }
    let family = vhdfs::storage::host::paths::canonical(FAMILY.path()).expect("a real name");
    let inside = family.join("inside");
    let child = inside.join("child.vhd");
    // Of any identity: the one outside is wanted.
    let outside = vhdfs::disk::Disk::open(
        &family.join("outside.vhd"),
        &vhdfs::disk::OpenOptions {
            read_only: true,
            ..Default::default()
        },
    );
    let mut identities: Vec<Identity> = outside.iter().map(|disk| disk.identity()).collect();
    identities.push(Identity::Vhd([7; 16]));
    let link = ParentLink { identities, paths };
    if let Ok(found) = HostParents::beside(&child, &[]).locate(&child, &link) {
        panic!("{} is not below {}", found.display(), inside.display());
    }
    // The same words find what lies inside, or nothing.
    let base = inside.join("base.vhd");
    let options = vhdfs::disk::OpenOptions {
        read_only: true,
        ..Default::default()
    };
    let base = vhdfs::disk::Disk::open(Path::new(&base), &options).expect("it opens");
    let link = ParentLink {
        identities: vec![base.identity()],
        ..link
    };
    if let Ok(found) = HostParents::beside(&child, &[]).locate(&child, &link) {
        assert!(found.starts_with(&inside), "{}", found.display());
    }
}
