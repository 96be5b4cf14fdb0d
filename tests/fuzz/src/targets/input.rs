//! Numbers out of a fuzzer's bytes; zeros once they run out.

use vhdfs::units::usize_from;

/// What is left of an input.
pub(super) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let (own, rest) = self.0.split_at(N.min(self.0.len()));
        bytes[..own.len()].copy_from_slice(own);
        self.0 = rest;
        bytes
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// One of `items`, which must not be empty.
    pub(super) fn one_of<'i, T>(&mut self, items: &'i [T]) -> &'i T {
        &items[usize::from(self.byte()) % items.len()]
    }

    /// A structure of `N` bytes; zeros where the input ends before.
    pub(super) fn structure<const N: usize>(&mut self) -> [u8; N] {
        self.array()
    }

    /// At most `count` bytes.
    pub(super) fn bytes(&mut self, count: u64) -> &'a [u8] {
        let count = usize_from(count).min(self.0.len());
        let (own, rest) = self.0.split_at(count);
        self.0 = rest;
        own
    }

    /// All that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
