#![no_main]

vhdfs_fuzz::fuzz!("file_vhdx");
