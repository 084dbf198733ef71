//! A bytea that is written in place: what is as large as a batch of events should not be copied without need.

use pgrx::pg_sys;

/// Bytes behind the length word of a varlena, in the memory context that was current when it was made.
pub struct Bytea {
    start: *mut u8,
    len: usize,
    capacity: usize,
}

impl Bytea {
    pub fn with_capacity(capacity: usize) -> Self {
        // SAFETY: palloc gives so many bytes or raises an error.
        let start = unsafe { pg_sys::palloc(pg_sys::VARHDRSZ + capacity) }.cast();
        Self {
            start,
            len: 0,
            capacity,
        }
    }

    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: so many bytes have been written there, and stay where they are while this is borrowed.
        unsafe { std::slice::from_raw_parts(self.start.add(pg_sys::VARHDRSZ), self.len) }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        let len = self.len + bytes.len();
        if len > self.capacity {
            self.capacity = len.max(self.capacity.saturating_mul(2));
            // SAFETY: repalloc gives so many bytes, with what was there, or raises an error and leaves the old ones.
            self.start = unsafe {
                pg_sys::repalloc(self.start.cast(), pg_sys::VARHDRSZ + self.capacity).cast()
            };
        }
        // SAFETY: the bytes from `len` on are ours up to the capacity, and nobody else's slice.
        unsafe {
            let end = self.start.add(pg_sys::VARHDRSZ + self.len);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), end, bytes.len());
        }
        self.len = len;
    }

    /// The value, which must not be used after this.
    pub fn datum(&self) -> pg_sys::Datum {
        // SAFETY: the length word is at the start, which palloc aligned.
        unsafe {
            pgrx::set_varsize_4b(self.start.cast(), (pg_sys::VARHDRSZ + self.len) as i32);
        }
        pg_sys::Datum::from(self.start)
    }
}

impl Drop for Bytea {
    fn drop(&mut self) {
        // SAFETY: palloc'd above, freed once; its context outlives the call that made it.
        unsafe { pg_sys::pfree(self.start.cast()) };
    }
}
