//! Links WinFsp on Windows so that its DLL is loaded when it is first called, not with the program:
//! everything but `vhdfs mount` works without it.

use std::env;
use std::path::Path;

/// What names the import library in a cross build; see `scripts/setup`.
const IMPORT_LIBRARY: &str = "WINFSP_IMPLIB";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed={IMPORT_LIBRARY}");
    let of_target = |name: &str| env::var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    if of_target("OS") != "windows" {
        return;
    }
    if of_target("ENV") == "msvc" {
        // As winfsp's own `winfsp_link_delayload` has it.
        let dll = match of_target("ARCH").as_str() {
            "aarch64" => "winfsp-a64.dll",
            "x86" => "winfsp-x86.dll",
            _ => "winfsp-x64.dll",
        };
        println!("cargo:rustc-link-lib=dylib=delayimp");
        println!("cargo:rustc-link-arg=/DELAYLOAD:{dll}");
        return;
    }
    // The crate winfsp brings an import library for Microsoft's linker alone, and none that loads late.
    match env::var(IMPORT_LIBRARY) {
        Ok(library) if Path::new(&library).is_file() => {
            println!("cargo:rerun-if-changed={library}");
            println!("cargo:rustc-link-arg={library}");
            // What the loading itself calls.
            for library in ["mingwex", "msvcrt", "kernel32"] {
                println!("cargo:rustc-link-arg=-l{library}");
            }
        }
        found => println!(
            "cargo:warning={IMPORT_LIBRARY} does not name WinFsp's import library but {found:?}: this \
             links only what does not mount; `scripts/setup windows` makes one"
        ),
    }
}
