//! The two headers: the only structures of a VHDX that are updated without its log.

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    HEADER_1, HEADER_2, MAX_LOG_LEN, MIB, checksum_without, guid_from_bytes, guid_to_bytes,
};
use crate::error::FormatError;
use crate::units::{FileOffset, FileRange, u64_from_u32};

/// Bytes in a header.
pub const HEADER_LEN: u64 = 4096;

const SIGNATURE: [u8; 4] = *b"head";
const CHECKSUM_AT: usize = 4;
const VERSION: u16 = 1;
/// The version of the log that is read and written.
pub const LOG_VERSION: u16 = 0;

/// A header as it lies in the file. [MS-VHDX 2.2.2]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0: `head`.
    signature: [u8; 4],
    /// 4: CRC-32C of the 4096 bytes.
    checksum: U32,
    /// 8: the header with the larger one is current.
    sequence_number: U64,
    /// 16: new whenever the file is opened for writing.
    file_write_guid: [u8; 16],
    /// 32: new whenever what a guest reads changes.
    data_write_guid: [u8; 16],
    /// 48: of the log entries to replay; 0 for none.
    log_guid: [u8; 16],
    /// 64: 0.
    log_version: U16,
    /// 66: 1.
    version: U16,
    /// 68: bytes of the log, a multiple of 1 MiB.
    log_length: U32,
    /// 72: where the log lies, a multiple of 1 MiB.
    log_offset: U64,
    /// 80: reserved. Kept.
    reserved: [u8; 4016],
}

const _: () = assert!(size_of::<RawHeader>() == 4096);

/// A header whose signature and checksum are good. Reserved bytes are kept as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The header with the larger one is current.
    pub sequence_number: u64,
    /// A new one whenever the file is opened for writing.
    pub file_write_guid: Uuid,
    /// A new one whenever what a guest reads changes: what children know their parent by.
    pub data_write_guid: Uuid,
    /// Of the log entries that are to be replayed; nil for none.
    pub log_guid: Uuid,
    /// The log's format: 0, or anything where there is no log.
    pub log_version: u16,
    /// The file's format: 1.
    pub version: u16,
    /// Bytes of the log.
    pub log_len: u32,
    /// Where the log lies.
    pub log_offset: u64,
    reserved: Box<[u8; 4016]>,
}

impl Header {
    /// A header of a new file whose log lies at `log`, which is at most 1 GiB long.
    pub fn new(sequence_number: u64, log: FileRange) -> Self {
        Self {
            sequence_number,
            file_write_guid: Uuid::new_v4(),
            data_write_guid: Uuid::new_v4(),
            log_guid: Uuid::nil(),
            log_version: LOG_VERSION,
            version: VERSION,
            log_len: u32::try_from(log.len).unwrap_or(u32::MAX),
            log_offset: log.start.get(),
            reserved: Box::new([0; 4016]),
        }
    }

    /// Decodes a header. Only signature and checksum make a header valid; whether what it says can
    /// be used is [`choose_header`]'s to find out, so that a newer one that cannot be used is not
    /// passed over for an older one.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] for a wrong signature or checksum.
    pub fn parse(bytes: &[u8; 4096]) -> Result<Self, FormatError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        let header = Self::decode(raw)?;
        let computed = checksum_without(bytes, CHECKSUM_AT);
        if raw.checksum.get() != computed {
            return Err(FormatError::corrupt(
                "header",
                format!("checksum {:#010x}", raw.checksum.get()),
                format!("{computed:#010x}, the CRC-32C of its bytes"),
            ));
        }
        Ok(header)
    }

    /// What the fields say, whatever the checksum is.
    fn decode(raw: RawHeader) -> Result<Self, FormatError> {
        if raw.signature != SIGNATURE {
            return Err(FormatError::corrupt("header", "no `head` signature", "one"));
        }
        Ok(Self {
            sequence_number: raw.sequence_number.get(),
            file_write_guid: guid_from_bytes(raw.file_write_guid),
            data_write_guid: guid_from_bytes(raw.data_write_guid),
            log_guid: guid_from_bytes(raw.log_guid),
            log_version: raw.log_version.get(),
            version: raw.version.get(),
            log_len: raw.log_length.get(),
            log_offset: raw.log_offset.get(),
            reserved: Box::new(raw.reserved),
        })
    }

    /// The bytes, with their checksum.
    pub fn to_bytes(&self) -> [u8; 4096] {
        let mut raw = RawHeader {
            signature: SIGNATURE,
            checksum: U32::new(0),
            sequence_number: U64::new(self.sequence_number),
            file_write_guid: guid_to_bytes(self.file_write_guid),
            data_write_guid: guid_to_bytes(self.data_write_guid),
            log_guid: guid_to_bytes(self.log_guid),
            log_version: U16::new(self.log_version),
            version: U16::new(self.version),
            log_length: U32::new(self.log_len),
            log_offset: U64::new(self.log_offset),
            reserved: *self.reserved,
        };
        raw.checksum = U32::new(checksum_without(raw.as_bytes(), CHECKSUM_AT));
        zerocopy::transmute!(raw)
    }

    /// Where the log lies.
    pub fn log_range(&self) -> FileRange {
        FileRange::new(FileOffset::new(self.log_offset), u64_from_u32(self.log_len))
    }

    /// Why the file cannot be used with this header as the current one.
    fn problem(&self, place: &str) -> Option<FormatError> {
        let structure = format!("header {place}");
        if self.version != VERSION {
            return Some(FormatError::incompatible(
                format!("format version {} in the {structure}", self.version),
                "only version 1 is known",
            ));
        }
        let has_log = !self.log_guid.is_nil();
        if has_log && self.log_version != LOG_VERSION {
            return Some(FormatError::incompatible(
                format!("log version {} in the {structure}", self.log_version),
                "only version 0 is known; open the file once with the program that wrote it",
            ));
        }
        let log = self.log_range();
        // A log that nobody needs may be missing from a file that is only read.
        let missing = log.is_empty() && !has_log;
        let placed = log.start.get() >= MIB
            && log.start.get().is_multiple_of(MIB)
            && log.len.is_multiple_of(MIB)
            && !log.is_empty()
            && log.start.get().checked_add(log.len).is_some();
        if !missing && !placed {
            return Some(FormatError::corrupt(
                structure,
                format!("a log of {} bytes at file offset {}", log.len, log.start),
                "multiples of 1 MiB, behind the first one",
            ));
        }
        (log.len > MAX_LOG_LEN).then(|| {
            FormatError::incompatible(
                format!("a log of {} bytes", log.len),
                "at most 1 GiB is supported",
            )
        })
    }
}

/// The header to go by, and what is in the other place.
#[derive(Clone, Debug)]
pub struct CurrentHeader {
    /// The current header.
    pub header: Header,
    /// Which of the two it is: 0 or 1.
    pub slot: usize,
    /// The other one.
    pub other: Result<Header, FormatError>,
    /// What is wrong with both, where the header is only what they agree in: see [`agreed_header`].
    pub doubt: Option<FormatError>,
}

impl CurrentHeader {
    /// Where the header in place `slot` lies.
    pub fn offset_of(slot: usize) -> FileOffset {
        if slot == 0 { HEADER_1 } else { HEADER_2 }
    }
}

/// Chooses the current one of the two headers: the only valid one, or that with the larger sequence
/// number.
///
/// Equal numbers break the format, but disk2vhd writes two identical headers: those are accepted,
/// the first as current.
///
/// # Errors
/// Where neither is valid, the two differ under one sequence number, or the current one says
/// something that is not possible or not supported.
pub fn choose_header(
    first: Result<Header, FormatError>,
    second: Result<Header, FormatError>,
) -> Result<CurrentHeader, FormatError> {
    let chosen = match (first, second) {
        (Ok(header), other) if is_newer(&header, other.as_ref().ok()) => CurrentHeader {
            header,
            slot: 0,
            other,
            doubt: None,
        },
        (Ok(first), Ok(second)) if first.sequence_number == second.sequence_number => {
            if first != second {
                return Err(FormatError::corrupt(
                    format!("headers at file offsets {HEADER_1} and {HEADER_2}"),
                    format!("two different ones numbered {}", first.sequence_number),
                    "different numbers, of which the larger is the current header's",
                ));
            }
            CurrentHeader {
                header: first,
                slot: 0,
                other: Ok(second),
                doubt: None,
            }
        }
        (other, Ok(header)) => CurrentHeader {
            header,
            slot: 1,
            other,
            doubt: None,
        },
        (Err(first), Err(second)) => {
            return Err(both_bad(&first, &second, "at least one good header"));
        }
        (Ok(_), Err(_)) => unreachable!("a header is newer than none"),
    };
    let place = format!("at file offset {}", CurrentHeader::offset_of(chosen.slot));
    match chosen.header.problem(&place) {
        Some(problem) => Err(problem),
        None => Ok(chosen),
    }
}

/// The header to go by where neither is valid, but both are whole except for their checksums: some
/// program computed those over other bytes, or overwrote what is reserved.
///
/// Only where both say the same of the log, and that it is not to be replayed: what a header that is lost
/// may have said of that is not to be guessed. Their GUIDs may differ, as in any file (QEMU's do). The reserved bytes, which are in doubt, become zeros.
///
/// # Errors
/// Where they do not, or what they say is not possible or not supported.
pub fn agreed_header(bytes: &[[u8; 4096]; 2]) -> Result<CurrentHeader, FormatError> {
    let fault = |slot: usize| match Header::parse(&bytes[slot]) {
        Err(fault) => fault,
        Ok(_) => FormatError::corrupt("header", "a good one", "a damaged one"),
    };
    let (first_fault, second_fault) = (fault(0), fault(1));
    let refused = |why: &str| {
        both_bad(
            &first_fault,
            &second_fault,
            &format!("at least one good header: {why}"),
        )
    };
    let decode = |slot: usize| Header::decode(zerocopy::transmute!(bytes[slot]));
    let (Ok(mut first), Ok(mut second)) = (decode(0), decode(1)) else {
        return Err(refused("what the lost one said of a log is not known"));
    };
    if !(first.log_guid.is_nil() && second.log_guid.is_nil()) {
        return Err(refused(
            "they name a log, and whether it has to be replayed cannot be told",
        ));
    }
    let says = |header: &Header| (header.version, header.log_version, header.log_range());
    let guids = |header: &Header| (header.file_write_guid, header.data_write_guid);
    let is_older = first.sequence_number < second.sequence_number;
    let is_same = first.sequence_number == second.sequence_number;
    if says(&first) != says(&second) || is_same && guids(&first) != guids(&second) {
        return Err(refused("the two contradict each other"));
    }
    for header in [&mut first, &mut second] {
        *header.reserved = [0; 4016];
    }
    let doubt = refused(
        "both say that no log is to be replayed, so that the disk can be read; `vhdfs check --repair` \
         writes them anew",
    );
    let chosen = CurrentHeader {
        header: if is_older { second } else { first },
        slot: usize::from(is_older),
        other: Err(if is_older { first_fault } else { second_fault }),
        doubt: Some(doubt),
    };
    let place = format!("at file offset {}", CurrentHeader::offset_of(chosen.slot));
    chosen.header.problem(&place).map_or(Ok(chosen), Err)
}

fn both_bad(first: &FormatError, second: &FormatError, expected: &str) -> FormatError {
    FormatError::corrupt(
        format!("headers at file offsets {HEADER_1} and {HEADER_2}"),
        format!("{} and {}", what(first), what(second)),
        expected,
    )
}

fn is_newer(header: &Header, other: Option<&Header>) -> bool {
    other.is_none_or(|other| header.sequence_number > other.sequence_number)
}

/// What a fault found, without the sentence around it.
fn what(fault: &FormatError) -> String {
    match fault {
        FormatError::Corrupt { found, .. } => found.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn header(sequence_number: u64) -> Header {
        Header::new(sequence_number, FileRange::new(FileOffset::new(MIB), MIB))
    }

    fn bad() -> Result<Header, FormatError> {
        Header::parse(&[0; 4096])
    }

    #[test]
    fn a_header_survives_the_file() {
        let mut header = header(7);
        header.reserved[4015] = 9;
        header.log_guid = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
        let bytes = header.to_bytes();
        assert_eq!(
            bytes[48..56],
            [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66]
        );
        assert_eq!(Header::parse(&bytes).unwrap(), header);
        for at in [0, 5, 8, 79, 4095] {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            let error = Header::parse(&damaged).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "byte {at}");
        }
    }

    #[test]
    fn the_larger_number_is_current() {
        let choose = |first: Result<Header, _>, second| choose_header(first, second).unwrap();
        assert_eq!(choose(Ok(header(2)), Ok(header(1))).slot, 0);
        assert_eq!(choose(Ok(header(1)), Ok(header(2))).slot, 1);
        assert_eq!(choose(Ok(header(0)), bad()).slot, 0);
        let fallback = choose(bad(), Ok(header(0)));
        assert_eq!(fallback.slot, 1);
        assert!(fallback.other.is_err());
        assert!(choose_header(bad(), bad()).is_err());
    }

    #[test]
    fn equal_numbers_are_accepted_of_equal_headers() {
        let one = header(1);
        let both = choose_header(Ok(one.clone()), Ok(one.clone())).unwrap();
        assert_eq!((both.slot, both.other), (0, Ok(one.clone())));
        let error = choose_header(Ok(one), Ok(header(1))).unwrap_err();
        assert!(
            error.to_string().contains("two different ones numbered 1"),
            "{error}"
        );
    }

    #[test]
    fn a_current_header_that_cannot_be_used_is_not_passed_over() {
        let with = |change: &dyn Fn(&mut Header)| {
            let mut newer = header(2);
            newer.log_guid = Uuid::from_u128(1);
            change(&mut newer);
            choose_header(Ok(header(1)), Ok(newer)).map(|chosen| chosen.slot)
        };
        let kind = |change: &dyn Fn(&mut Header)| with(change).unwrap_err().kind();
        assert_eq!(with(&|_| {}), Ok(1));
        assert_eq!(kind(&|header| header.version = 2), ErrorKind::Incompatible);
        assert_eq!(
            kind(&|header| header.log_version = 1),
            ErrorKind::Incompatible
        );
        assert_eq!(kind(&|header| header.log_len = 0), ErrorKind::Corrupt);
        assert_eq!(kind(&|header| header.log_len = 4096), ErrorKind::Corrupt);
        assert_eq!(kind(&|header| header.log_offset = 0), ErrorKind::Corrupt);
        assert_eq!(
            kind(&|header| header.log_offset = 0u64.wrapping_sub(MIB)),
            ErrorKind::Corrupt
        );
        assert_eq!(
            kind(&|header| header.log_len = 1025 << 20),
            ErrorKind::Incompatible
        );
        // Without a log to replay, its version means nothing, and it may be missing.
        let idle = |header: &mut Header| {
            header.log_guid = Uuid::nil();
            header.log_version = 3;
            header.log_len = 0;
        };
        assert_eq!(with(&idle), Ok(1));
    }
}
