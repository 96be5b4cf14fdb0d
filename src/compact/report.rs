//! What a compaction did, and why the rest of the file stays.

/// Bytes of the file that stay, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Why, for people.
    pub reason: String,
    /// How many bytes of the file's length.
    pub bytes: u64,
}

/// What a compaction did, or, of a dry run, would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompactReport {
    /// The file's length in bytes when the disk was opened.
    pub length_before: u64,
    /// The file's length after. Of a dry run, exactly what a run would reach if nothing changes.
    pub length_after: u64,
    /// Bytes that the host stored for the file when the disk was opened.
    pub allocated_before: u64,
    /// Bytes that the host stores after. Of a dry run, an estimate.
    pub allocated_after: u64,
    /// Blocks that left the block table.
    pub blocks_dropped: u64,
    /// Blocks that went to another place in the file.
    pub blocks_moved: u64,
    /// Bytes written for those moves.
    pub bytes_moved: u64,
    /// Bytes read to find out what is zero.
    pub bytes_read: u64,
    /// Bytes inside live blocks that were given back to the host.
    pub bytes_punched: u64,
    /// Why each byte of the file stays; sums up to the length after.
    pub kept: Vec<Kept>,
}
