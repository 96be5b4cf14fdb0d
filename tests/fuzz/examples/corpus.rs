//! Writes what each target starts from into DIR/TARGET, for those named or for all.

use std::fs;
use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let folder = PathBuf::from(arguments.next().expect("usage: corpus DIR [TARGET...]"));
    let wanted: Vec<_> = arguments.collect();
    for (name, seeds) in vhdfs_fuzz::targets() {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| wanted == name) {
            continue;
        }
        fs::create_dir_all(folder.join(name))?;
        for (n, seed) in seeds().iter().enumerate() {
            fs::write(folder.join(name).join(format!("seed-{n}")), seed)?;
        }
    }
    Ok(())
}
