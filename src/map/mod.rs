//! Where blocks lie, and which space of the host file is free. Pure: no I/O.

mod block_map;
mod free_space;
mod memory;
mod occupied;

pub use block_map::{BlockMap, BlockState};
pub use free_space::{FreeSpace, SlotShape};
pub(crate) use memory::Charge;
pub(crate) use occupied::Occupied;
