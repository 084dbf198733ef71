//! A bytea that is written in place: what is as large as a batch of events should not be copied without need.

use pgrx::pg_sys;

use super::spare;

/// Bytes behind the length word of a varlena.
pub struct Bytea(Vec<u8>);

impl Bytea {
    pub fn with_capacity(capacity: usize) -> Self {
        let mut bytes = spare::take(pg_sys::VARHDRSZ + capacity);
        bytes.resize(pg_sys::VARHDRSZ, 0);
        let mut new = Self(bytes);
        new.note_length();
        new
    }

    pub fn as_bytes(&self) -> &[u8] {
        self.0.get(pg_sys::VARHDRSZ..).unwrap_or_default()
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        self.note_length();
    }

    /// The value, which is good as long as this is.
    pub fn datum(&self) -> pg_sys::Datum {
        pg_sys::Datum::from(self.0.as_ptr())
    }

    fn note_length(&mut self) {
        // SAFETY: the buffer has a length word at its start, where the allocator aligns for anything that is not larger than
        // two words. No value is longer than one that the server can hold: callers bound what they write.
        unsafe { pgrx::set_varsize_4b(self.0.as_mut_ptr().cast(), self.0.len() as i32) };
    }
}

impl From<Vec<u8>> for Bytea {
    fn from(mut bytes: Vec<u8>) -> Self {
        bytes.splice(0..0, [0; pg_sys::VARHDRSZ]);
        let mut new = Self(bytes);
        new.note_length();
        new
    }
}

impl Drop for Bytea {
    fn drop(&mut self) {
        spare::give(std::mem::take(&mut self.0));
    }
}
