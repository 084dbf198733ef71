//! What is left in a table's pages of rows that are gone.
//!
//! VACUUM frees the room of a dead row and leaves its bytes there until something else is written over them. Here the
//! free room of each page is overwritten with zeros: between the line pointers and the tuples, and behind a tuple up to
//! where the next one may begin. It is WAL-logged as generic changes, whose replay empties the same room on a standby.

use pgrx::pg_sys;

use super::wait;

const PAGE_BYTES: usize = pg_sys::BLCKSZ as usize;
/// Tuples begin at multiples of this (MAXALIGN).
const ALIGNMENT: usize = 8;

/// What a look at some pages found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scrubbed {
    pub pages: u32,
    /// Pages that had remains, now overwritten.
    pub cleaned: u32,
    /// Pages with a dead row that VACUUM has still to remove.
    pub dirty: u32,
    /// There are no pages behind these.
    pub end: bool,
}

/// A table and the table of its long values, if it has one.
pub fn with_toast(relation: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    // SAFETY: the relation is opened and closed around the read.
    let toast = unsafe {
        let rel = pg_sys::relation_open(relation, pg_sys::AccessShareLock as i32);
        let toast = (*(*rel).rd_rel).reltoastrelid;
        pg_sys::relation_close(rel, pg_sys::AccessShareLock as i32);
        toast
    };
    let found = (toast != pg_sys::InvalidOid).then_some(toast);
    std::iter::once(relation).chain(found).collect()
}

/// Empties the free room of up to `count` pages of a heap from page `first` on. Rows removed by transactions up to
/// `removed_by` count as dead. Cancellable between two pages.
pub fn pages(relation: pg_sys::Oid, first: u32, count: u32, removed_by: u64) -> Scrubbed {
    let mut done = Scrubbed::default();
    // SAFETY: the relation stays open and locked, so it cannot get shorter, to the end of the loop; the ring of buffers
    // is freed with the transaction's memory. Each page is looked at under its buffer's lock, which is given back
    // before the next.
    unsafe {
        let rel = pg_sys::relation_open(relation, pg_sys::RowExclusiveLock as i32);
        let ring = pg_sys::GetAccessStrategy(pg_sys::BufferAccessStrategyType::BAS_VACUUM);
        let blocks = pg_sys::RelationGetNumberOfBlocksInFork(rel, pg_sys::ForkNumber::MAIN_FORKNUM);
        let end = blocks.min(first.saturating_add(count));
        for block in first..end {
            wait::check_interrupts();
            let buffer = pg_sys::ReadBufferExtended(
                rel,
                pg_sys::ForkNumber::MAIN_FORKNUM,
                block,
                pg_sys::ReadBufferMode::RBM_NORMAL,
                ring,
            );
            pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE as i32);
            let page = pg_sys::BufferGetPage(buffer);
            let dirty = has_dead_rows(page, buffer, relation, block, removed_by as u32);
            let remains = has_remains(page);
            pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_UNLOCK as i32);
            if remains {
                pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_EXCLUSIVE as i32);
                let change = pg_sys::GenericXLogStart(rel);
                let copy = pg_sys::GenericXLogRegisterBuffer(change, buffer, 0);
                fill_room(copy);
                pg_sys::GenericXLogFinish(change);
                pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_UNLOCK as i32);
                done.cleaned += 1;
            }
            pg_sys::ReleaseBuffer(buffer);
            done.pages += 1;
            done.dirty += u32::from(dirty);
        }
        done.end = end == blocks;
        pg_sys::FreeAccessStrategy(ring);
        pg_sys::relation_close(rel, pg_sys::NoLock as i32);
    }
    done
}

/// The room of a page that holds no data, as ranges of its bytes. None for a page that was never used.
///
/// # Safety
/// The page is locked, or a private copy.
unsafe fn room(page: pg_sys::Page) -> Vec<std::ops::Range<usize>> {
    // SAFETY: header and line pointers lie within the page; what they say is checked against its size.
    unsafe {
        if pg_sys::PageIsNew(page) {
            return Vec::new();
        }
        let header = page.cast::<pg_sys::PageHeaderData>();
        let lower = usize::from((*header).pd_lower);
        let upper = usize::from((*header).pd_upper);
        if lower > upper || upper > PAGE_BYTES {
            return Vec::new();
        }
        let mut room = Vec::with_capacity(8);
        room.push(lower..upper);
        for offset in 1..=pg_sys::PageGetMaxOffsetNumber(page) {
            let item = *pg_sys::PageGetItemId(page, offset);
            if item.lp_flags() != pg_sys::LP_NORMAL {
                continue;
            }
            let end = item.lp_off() as usize + item.lp_len() as usize;
            let next = end.next_multiple_of(ALIGNMENT);
            if end >= upper && next <= PAGE_BYTES && next > end {
                room.push(end..next);
            }
        }
        room
    }
}

/// # Safety
/// As for [`room`].
unsafe fn has_remains(page: pg_sys::Page) -> bool {
    // SAFETY: the ranges lie within the page.
    unsafe {
        let bytes = std::slice::from_raw_parts(page.cast::<u8>(), PAGE_BYTES);
        room(page)
            .into_iter()
            .any(|range| bytes[range].iter().any(|&byte| byte != 0))
    }
}

/// # Safety
/// As for [`room`]; the page may be written.
unsafe fn fill_room(page: pg_sys::Page) {
    // SAFETY: the ranges lie within the page.
    unsafe {
        let room = room(page);
        let bytes = std::slice::from_raw_parts_mut(page.cast::<u8>(), PAGE_BYTES);
        for range in room {
            bytes[range].fill(0);
        }
    }
}

/// Whether a row that nobody can see any more is still in the page.
///
/// # Safety
/// The buffer is pinned and share-locked, and its page is `page`.
unsafe fn has_dead_rows(
    page: pg_sys::Page,
    buffer: pg_sys::Buffer,
    relation: pg_sys::Oid,
    block: u32,
    removed_by: u32,
) -> bool {
    // SAFETY: a normal line pointer leads to a tuple of the page; its header is read under the lock.
    unsafe {
        if pg_sys::PageIsNew(page) {
            return false;
        }
        // Removed before this id counts as dead; ids below the first normal one are special.
        let horizon = removed_by
            .wrapping_add(1)
            .max(u32::from(pg_sys::FirstNormalTransactionId));
        (1..=pg_sys::PageGetMaxOffsetNumber(page)).any(|offset| {
            let item = pg_sys::PageGetItemId(page, offset);
            if (*item).lp_flags() != pg_sys::LP_NORMAL {
                return false;
            }
            let mut tuple = pg_sys::HeapTupleData {
                t_len: (*item).lp_len(),
                t_self: pg_sys::ItemPointerData {
                    ip_blkid: pg_sys::BlockIdData {
                        bi_hi: (block >> 16) as u16,
                        bi_lo: block as u16,
                    },
                    ip_posid: offset,
                },
                t_tableOid: relation,
                t_data: pg_sys::PageGetItem(page, item).cast(),
            };
            pg_sys::HeapTupleSatisfiesVacuum(&mut tuple, horizon.into(), buffer)
                == pg_sys::HTSV_Result::HEAPTUPLE_DEAD
        })
    }
}
