//! Where blocks lie, and which space of the host file is free. Pure: no I/O.

mod block_map;
mod free_space;

pub use block_map::{BlockMap, BlockState};
pub use free_space::{FreeSpace, SlotShape};
