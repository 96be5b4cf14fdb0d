//! Access control lists (`acl(5)`), which may deny what the mode of a file allows.

use std::io;
use std::path::Path;

use rustix::io::Errno;

const ATTRIBUTE: &str = "system.posix_acl_access";

/// The list of the file at `path`, as the kernel stores it; empty where it has none. Of a symbolic link,
/// that of what it leads to, or, without `follow`, its own.
///
/// # Errors
/// What the host answers.
pub fn access_list(path: &Path, follow: bool) -> io::Result<Vec<u8>> {
    /// As long as a value can be.
    const LONGEST: usize = 64 << 10;
    let read = |list: &mut Vec<u8>| match follow {
        true => rustix::fs::getxattr(path, ATTRIBUTE, &mut list[..]),
        false => rustix::fs::lgetxattr(path, ATTRIBUTE, &mut list[..]),
    };
    let mut list = vec![0; 512];
    let found = match read(&mut list) {
        Err(Errno::RANGE) => {
            list.resize(LONGEST, 0);
            read(&mut list)
        }
        found => found,
    };
    match found {
        Ok(len) => list.truncate(len),
        // There is none, or the file system has no such lists.
        Err(Errno::NODATA | Errno::OPNOTSUPP) => list.clear(),
        Err(error) => return Err(error.into()),
    }
    Ok(list)
}
