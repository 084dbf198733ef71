//! A block of shared memory between a backend and the worker it waits for: a request one way, a reply the other.

use std::sync::atomic::{AtomicU32, Ordering};

use pgrx::pg_sys;

use super::error::{PgError, Result};

/// Largest request or reply.
pub const BUFFER_BYTES: usize = 1 << 20;

#[repr(C)]
struct Header {
    /// Length of the request in the buffer, then (once `done`) of the reply.
    len: AtomicU32,
    done: AtomicU32,
}

/// A mapped block, unmapped on drop; on an error the resource owner unmaps it.
pub struct Block(*mut pg_sys::dsm_segment);

impl Drop for Block {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: mapped by us and not detached before; nobody keeps a reference into it.
            unsafe { pg_sys::dsm_detach(self.0) };
        }
    }
}

impl Block {
    /// Makes a block that holds the request.
    pub fn create(request: &[u8]) -> Result<Self> {
        if request.len() > BUFFER_BYTES {
            return Err(PgError::new("54000", "request to a worker is too large"));
        }
        // SAFETY: dsm_create raises an error rather than return null without the flag.
        let segment = unsafe { pg_sys::dsm_create(size_of::<Header>() + BUFFER_BYTES, 0) };
        let block = Self(segment);
        block.write(request);
        Ok(block)
    }

    /// Maps a block by the number that [`Block::number`] gave. None: its maker is gone.
    pub fn attach(number: u32) -> Option<Self> {
        // SAFETY: null for an unknown handle.
        let segment = unsafe { pg_sys::dsm_attach(number) };
        (!segment.is_null()).then(|| Self(segment))
    }

    /// Keeps the mapping to the end of the process.
    pub fn pin(&self) {
        // SAFETY: the segment is mapped.
        unsafe { pg_sys::dsm_pin_mapping(self.0) };
    }

    pub fn number(&self) -> u32 {
        // SAFETY: the segment is mapped.
        unsafe { pg_sys::dsm_segment_handle(self.0) }
    }

    fn header(&self) -> &Header {
        // SAFETY: the segment is at least a header large, page-aligned, and its atomics may be shared.
        unsafe { &*pg_sys::dsm_segment_address(self.0).cast::<Header>() }
    }

    fn buffer(&self) -> *mut u8 {
        // SAFETY: the buffer follows the header inside the segment.
        unsafe {
            pg_sys::dsm_segment_address(self.0)
                .cast::<u8>()
                .add(size_of::<Header>())
        }
    }

    fn write(&self, bytes: &[u8]) {
        // SAFETY: at most BUFFER_BYTES into a buffer of that size; the other side reads only after `done` or start.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.buffer(), bytes.len()) };
        self.header()
            .len
            .store(bytes.len() as u32, Ordering::Release);
    }

    /// The request, or once done the reply.
    pub fn read(&self) -> Vec<u8> {
        let len = (self.header().len.load(Ordering::Acquire) as usize).min(BUFFER_BYTES);
        let mut bytes = vec![0; len];
        // SAFETY: `len` bytes of the buffer were written before `len` was stored.
        unsafe { std::ptr::copy_nonoverlapping(self.buffer(), bytes.as_mut_ptr(), len) };
        bytes
    }

    /// Writes the reply and says so. False: it is too large.
    pub fn reply(&self, bytes: &[u8]) -> bool {
        if bytes.len() > BUFFER_BYTES {
            return false;
        }
        self.write(bytes);
        self.header().done.store(1, Ordering::Release);
        true
    }

    pub fn is_done(&self) -> bool {
        self.header().done.load(Ordering::Acquire) == 1
    }
}
