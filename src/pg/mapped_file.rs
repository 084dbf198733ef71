//! A read-only file in memory that all processes share with the operating system's cache.
//!
//! Reading a mapped page of a file that has become shorter kills the process, and with it every session of the
//! server. So who reads asks [`MappedFile::is_unchanged`] before: a file that is replaced by another one (as is right)
//! stays whole under its old mapping, and one that is overwritten in place is noticed by its size and times.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::ptr::NonNull;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

pub struct MappedFile {
    file: File,
    stamp: Stamp,
    start: NonNull<u8>,
    bytes: usize,
}

impl MappedFile {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let bytes = usize::try_from(metadata.len()).unwrap_or(0);
        if !metadata.is_file() || bytes == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not a file with content",
            ));
        }
        // SAFETY: a new read-only mapping of an open file; unmapped in Drop.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            stamp: Stamp::of(&metadata),
            file,
            start,
            bytes,
        })
    }

    /// Whether the mapped file is as it was when it was opened.
    pub fn is_unchanged(&self) -> bool {
        self.file
            .metadata()
            .is_ok_and(|metadata| Stamp::of(&metadata) == self.stamp)
    }

    /// Whether the path leads to this very file, unchanged.
    pub fn is_at(&self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|metadata| Stamp::of(&metadata) == self.stamp)
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: mapped for reading, for as long as this value lives. What another program writes into the file
        // shows here; the reader takes any bytes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `open`, which nothing borrows any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
