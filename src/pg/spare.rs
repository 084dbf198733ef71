//! Large buffers of a session that are used again by its next call. Memory fresh from the kernel costs a page fault for every
//! 4 kB, which is more than is done with most bytes of a batch; what the allocator gets back at the end of each call, it
//! returns to the kernel.

use std::cell::RefCell;

/// So many buffers are kept, none of more bytes than that.
const BUFFERS: usize = 2;
const BUFFER_BYTES: usize = 4 << 20;

thread_local! {
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer of at least this capacity.
pub fn take(capacity: usize) -> Vec<u8> {
    let mut buffer = SPARE.with_borrow_mut(|spare| {
        // The smallest that is large enough, or the largest.
        let best = (0..spare.len()).min_by_key(|&at| {
            let has = spare[at].capacity();
            (has < capacity, has.abs_diff(capacity))
        });
        best.map(|at| spare.swap_remove(at)).unwrap_or_default()
    });
    buffer.reserve(capacity);
    buffer
}

/// Keeps a buffer for the next call, if it is not too large.
pub fn give(mut buffer: Vec<u8>) {
    if buffer.capacity() == 0 || buffer.capacity() > BUFFER_BYTES {
        return;
    }
    buffer.clear();
    SPARE.with_borrow_mut(|spare| {
        if spare.len() < BUFFERS {
            spare.push(buffer);
        }
    });
}
