//! Fields of structures, sums and texts, for both formats.

/// A GUID or UUID as its 16 bytes lie in the file.
pub(crate) type Guid = [u8; 16];

/// Answers that this is not so, where it is not.
macro_rules! require {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(format!($($text)+));
        }
    };
}
pub(crate) use require;

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N]
        .try_into()
        .expect("a slice of this length")
}

pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(bytes, at))
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(field(bytes, at))
}

pub(super) fn guid(bytes: &[u8], at: usize) -> Guid {
    field(bytes, at)
}

/// Puts `field` into `bytes` at `at`.
pub(super) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// The CRC-32C of each byte, reflected.
const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let (mut index, mut value) = (0, 0u32);
    while index < table.len() {
        let (mut crc, mut bit) = (value, 0);
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
            bit += 1;
        }
        table[index] = crc;
        (index, value) = (index + 1, value + 1);
    }
    table
};

/// The CRC-32C (Castagnoli) of `bytes`.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    !crc_on(u32::MAX, bytes)
}

fn crc_on(crc: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, &byte| {
        let [low, ..] = crc.to_le_bytes();
        crc >> 8 ^ CRC_TABLE[usize::from(low ^ byte)]
    })
}

/// The CRC-32C of a VHDX structure, which has its checksum at 4, taken as zeros.
pub(super) fn vhdx_checksum(bytes: &[u8]) -> u32 {
    let before = crc_on(crc_on(u32::MAX, &bytes[..4]), &[0; 4]);
    !crc_on(before, &bytes[8..])
}

/// Sets the checksum of a VHDX structure.
pub(super) fn seal_vhdx(bytes: &mut [u8]) {
    let sum = vhdx_checksum(bytes);
    put(bytes, 4, &sum.to_le_bytes());
}

/// The ones' complement of the sum of a VHD structure's bytes, its checksum at `field` left out.
pub(super) fn vhd_checksum(bytes: &[u8], field: usize) -> u32 {
    let (before, after) = (&bytes[..field], &bytes[field + 4..]);
    !before
        .iter()
        .chain(after)
        .map(|&b| u32::from(b))
        .sum::<u32>()
}

/// The number that a GUID is written as: its first three groups are little-endian in the file.
fn in_text_order(guid: &Guid) -> Guid {
    [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15].map(|n: usize| guid[n])
}

/// The lowercase text of `guid`, in braces.
pub(crate) fn guid_text(guid: &Guid) -> String {
    let mut text = String::from("{");
    for (n, byte) in in_text_order(guid).iter().enumerate() {
        if matches!(n, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text + "}"
}

/// The GUID that `text` names, of any case, with or without braces.
pub(crate) fn parse_guid(text: &str) -> Option<Guid> {
    let bare = match text.strip_prefix('{') {
        Some(rest) => rest.strip_suffix('}')?,
        None => text,
    };
    let groups: Vec<usize> = bare.split('-').map(str::len).collect();
    if groups != [8, 4, 4, 4, 12] || !bare.is_ascii() {
        return None;
    }
    let digits: String = bare.split('-').collect();
    let mut bytes = [0; 16];
    for (n, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * n..2 * n + 2], 16).ok()?;
    }
    Some(in_text_order(&bytes))
}

/// The text that little-endian UTF-16 holds.
pub(super) fn utf16le(bytes: &[u8]) -> Result<String, String> {
    require!(
        bytes.len().is_multiple_of(2),
        "a UTF-16 text of {} bytes",
        bytes.len()
    );
    let units: Vec<u16> = bytes.chunks(2).map(|pair| le16(pair, 0)).collect();
    String::from_utf16(&units).map_err(|error| error.to_string())
}

/// `text` in little-endian UTF-16.
pub(super) fn to_utf16le(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}
