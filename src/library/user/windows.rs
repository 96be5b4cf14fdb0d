//! Access tokens, asked against the security descriptors of the files.

use std::io;
use std::os::windows::io::BorrowedHandle;
use std::path::Path;

use crate::storage::host::pin::Pin;
use crate::storage::host::windows::Token;

/// Whoever asks for something.
#[derive(Debug)]
pub struct User(Token);

impl User {
    /// The one whom `token` stands for: a primary or impersonation token that may be duplicated. It
    /// is only asked what it may do; nobody acts by it.
    ///
    /// # Errors
    /// What the host answers.
    pub fn from_token(token: BorrowedHandle<'_>) -> io::Result<Self> {
        Token::duplicate(token).map(Self)
    }

    /// Whether the host lets it read the file at `path`, an absolute path without links. The
    /// directories above do not count: who knows the name of a file in a directory that may not be
    /// listed gets it on Windows ("bypass traverse checking").
    pub(in crate::library) fn may_read(&self, path: &Path, _top: &Path) -> bool {
        let allowed = Pin::file(path).and_then(|file| file.allows_reading(&self.0));
        allowed.unwrap_or_else(|error| {
            log::debug!("{}: whether somebody may read it: {error}", path.display());
            false
        })
    }
}
