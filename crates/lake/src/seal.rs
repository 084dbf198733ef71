//! The envelope of everything that lies as bytes in Postgres: four bytes of magic, a checksum, the payload.
//!
//! Decoders of Arrow, Thrift and our own formats then see only bytes that an encoder wrote; what they still might do
//! with crafted bytes is caught by [`guarded`].

use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use twox_hash::XxHash64;

use crate::error::LakeError;

/// Length of magic and checksum.
pub(crate) const HEADER: usize = 12;

/// A buffer with room for the header; pass it to [`seal`] once the payload is appended.
pub(crate) fn start(capacity: usize) -> Vec<u8> {
    within(Vec::with_capacity(HEADER + capacity))
}

/// The same of a buffer that has served before.
pub(crate) fn within(mut buffer: Vec<u8>) -> Vec<u8> {
    buffer.clear();
    buffer.resize(HEADER, 0);
    buffer
}

/// Fills in the header of a buffer made by [`start`].
pub(crate) fn seal(mut buffer: Vec<u8>, magic: [u8; 4]) -> Vec<u8> {
    let checksum = XxHash64::oneshot(0, &buffer[HEADER..]);
    buffer[..4].copy_from_slice(&magic);
    buffer[4..HEADER].copy_from_slice(&checksum.to_le_bytes());
    buffer
}

/// The payload of sealed bytes, checked.
pub(crate) fn open(sealed: Bytes, magic: [u8; 4], what: &'static str) -> Result<Bytes, LakeError> {
    let Some((header, payload)) = sealed.split_at_checked(HEADER) else {
        return Err(LakeError::corrupt(what, "too short"));
    };
    if header[..4] != magic {
        return Err(LakeError::corrupt(what, "unknown format"));
    }
    if header[4..] != XxHash64::oneshot(0, payload).to_le_bytes() {
        return Err(LakeError::corrupt(what, "checksum mismatch"));
    }
    Ok(sealed.slice(HEADER..))
}

/// Runs a decoder of somebody else's; its panic is an error like any other.
pub(crate) fn guarded<T>(
    what: &'static str,
    decode: impl FnOnce() -> Result<T, LakeError>,
) -> Result<T, LakeError> {
    catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_| Err(LakeError::corrupt(what, "the decoder failed")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_bit_is_seen() {
        let mut buffer = start(3);
        buffer.extend_from_slice(b"abc");
        let sealed = seal(buffer, *b"TEST");
        assert_eq!(
            &open(sealed.clone().into(), *b"TEST", "test").unwrap()[..],
            b"abc"
        );
        for bit in 0..sealed.len() * 8 {
            let mut bad = sealed.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(open(bad.into(), *b"TEST", "test").is_err());
        }
        for len in 0..sealed.len() {
            assert!(open(sealed[..len].to_vec().into(), *b"TEST", "test").is_err());
        }
    }
}
