#![no_main]

vhdfs_fuzz::fuzz!("edit_vhdx");
