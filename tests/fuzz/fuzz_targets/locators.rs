#![no_main]

vhdfs_fuzz::fuzz!("locators");
