use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use datafusion_execution::memory_pool::MemoryConsumer;

use super::*;

/// Several pools' budget, as the server's, which notes the most that was ever taken.
#[derive(Default)]
struct Shared {
    limit: AtomicUsize,
    taken: AtomicUsize,
    most: AtomicUsize,
    calls: AtomicUsize,
}

impl Shared {
    fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicUsize::new(limit),
            ..Self::default()
        })
    }

    fn taken(&self) -> usize {
        self.taken.load(Ordering::SeqCst)
    }
}

impl Budget for Shared {
    fn try_take(&self, bytes: usize) -> bool {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let limit = self.limit();
        let before = self
            .taken
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |taken| {
                Some(taken + bytes).filter(|&sum| sum <= limit)
            });
        if let Ok(before) = before {
            self.most.fetch_max(before + bytes, Ordering::SeqCst);
        }
        before.is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let before = self.taken.fetch_sub(bytes, Ordering::SeqCst);
        assert!(before >= bytes, "{bytes} of {before} bytes are given back");
    }

    fn limit(&self) -> usize {
        self.limit.load(Ordering::SeqCst)
    }
}

fn pool(budget: &Arc<Shared>) -> Arc<dyn MemoryPool> {
    Arc::new(BudgetPool::new(Arc::clone(budget) as _))
}

fn reservation(pool: &Arc<dyn MemoryPool>) -> MemoryReservation {
    MemoryConsumer::new("test").register(pool)
}

#[test]
fn takes_slices_and_gives_them_back() {
    let limit = 1 << 30;
    let slice = limit / SLICES;
    let budget = Shared::new(limit);
    let pool = pool(&budget);
    let (first, second) = (reservation(&pool), reservation(&pool));

    first.try_grow(1).unwrap();
    assert_eq!((pool.reserved(), budget.taken()), (1, slice));
    for _ in 0..1000 {
        second.try_grow(100).unwrap();
    }
    assert_eq!(budget.calls.load(Ordering::SeqCst), 1, "within one slice");
    first.try_grow(3 * slice).unwrap();
    assert_eq!(pool.reserved(), 3 * slice + 100_001);
    assert_eq!(budget.taken(), 4 * slice);

    first.shrink(3 * slice);
    assert_eq!(budget.taken(), 100_001 + slice, "one slice is kept");
    drop(first);
    assert_eq!(pool.reserved(), 100_000);
    drop(second);
    assert_eq!((pool.reserved(), budget.taken()), (0, 0));
}

#[test]
fn slices_suit_the_limit() {
    for (limit, slice) in [
        (0, SLICE_BYTES_MIN),
        (1 << 20, SLICE_BYTES_MIN),
        (16 << 20, SLICE_BYTES_MIN),
        (1 << 30, 4 << 20),
        (1 << 40, SLICE_BYTES_MAX),
    ] {
        let pool = BudgetPool::new(Shared::new(limit));
        assert_eq!(pool.slice_bytes(), slice, "for a limit of {limit}");
        assert!(matches!(pool.memory_limit(), MemoryLimit::Finite(n) if n == limit));
    }
}

/// Every byte of the limit can be used, and not one more.
#[test]
fn the_limit_is_exact() {
    for limit in [1, 1000, SLICE_BYTES_MIN + 1, 5_000_000] {
        let budget = Shared::new(limit);
        let (one, other) = (pool(&budget), pool(&budget));
        let (a, b) = (reservation(&one), reservation(&other));
        a.try_grow(limit / 2).unwrap();
        a.try_grow(limit - limit / 2).unwrap();
        for pool_is_full in [&a, &b] {
            let error = pool_is_full.try_grow(1).unwrap_err();
            let error = EngineError::from(error);
            assert_eq!(error, EngineError::OutOfMemory);
            assert_eq!(error.sqlstate(), "53200");
            assert!(error.message().contains("rakam.memory_limit"));
        }
        assert_eq!((one.reserved(), other.reserved()), (limit, 0));
        assert_eq!(budget.taken(), limit);
        a.free();
        b.try_grow(limit).unwrap();
        drop((a, b));
        assert_eq!(budget.taken(), 0);
    }
}

#[test]
fn a_request_beyond_all_numbers_is_refused() {
    let budget = Shared::new(usize::MAX);
    let pool = pool(&budget);
    let all = reservation(&pool);
    all.try_grow(10).unwrap();
    assert!(all.try_grow(usize::MAX).is_err());
    assert_eq!(pool.reserved(), 10);
    drop(all);
    assert_eq!(budget.taken(), 0);
}

#[test]
fn a_limit_that_changes_holds_from_then_on() {
    let budget = Shared::new(10 << 20);
    let pool = pool(&budget);
    let held = reservation(&pool);
    held.try_grow(10 << 20).unwrap();
    budget.limit.store(1 << 20, Ordering::SeqCst);
    assert!(held.try_grow(1).is_err());
    held.shrink(9 << 20);
    assert!(budget.taken() <= (1 << 20) + SLICE_BYTES_MIN);
    budget.limit.store(20 << 20, Ordering::SeqCst);
    held.try_grow(19 << 20).unwrap();
    drop(held);
    assert_eq!(budget.taken(), 0);
}

#[test]
fn growth_that_cannot_fail_is_made_good_first() {
    let budget = Shared::new(1000);
    let pool = pool(&budget);
    let (a, b) = (reservation(&pool), reservation(&pool));
    a.try_grow(900).unwrap();
    b.grow(500);
    assert_eq!(pool.reserved(), 1400);
    assert!(budget.taken() <= 1000);
    assert!(a.try_grow(1).is_err());
    b.shrink(400);
    assert!(a.try_grow(1).is_err());
    a.shrink(500);
    a.try_grow(500).unwrap();
    drop((a, b));
    assert_eq!((pool.reserved(), budget.taken()), (0, 0));
}

/// Threads of several pools take and give back at random: the sum never exceeds the limit, and nothing is lost.
#[test]
fn many_pools_share_one_budget() {
    let limit = 40 << 20;
    let budget = Shared::new(limit);
    let refused = AtomicUsize::new(0);
    thread::scope(|scope| {
        for process in 0..4u64 {
            let pool = pool(&budget);
            for worker in 0..4u64 {
                let (pool, budget, refused) = (Arc::clone(&pool), &budget, &refused);
                scope.spawn(move || {
                    let mut seed = process * 7 + worker * 131 + 1;
                    let mut held = Vec::new();
                    for _ in 0..5_000 {
                        seed ^= seed << 13;
                        seed ^= seed >> 7;
                        seed ^= seed << 17;
                        if seed.is_multiple_of(5) {
                            held.clear();
                        }
                        let one = reservation(&pool);
                        match one.try_grow((seed >> 20) as usize % (2 << 20)) {
                            Ok(()) => held.push(one),
                            Err(_) => {
                                refused.fetch_add(1, Ordering::SeqCst);
                                held.pop();
                            }
                        }
                        assert!(budget.taken() <= limit);
                    }
                });
            }
        }
    });
    assert_eq!(budget.taken(), 0);
    assert!(budget.most.load(Ordering::SeqCst) > limit / 2);
    assert!(refused.load(Ordering::SeqCst) > 0);
}
