#![no_main]

vhdfs_fuzz::fuzz!("guest_btrfs");
