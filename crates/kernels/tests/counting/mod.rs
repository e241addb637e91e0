//! An allocator that counts bytes, for tests of memory: tests that use it do not run at the same time.

#![allow(unsafe_code, reason = "an allocator is unsafe to write")]

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    /// # Safety
    /// That of the system's allocator.
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        let live = LIVE.fetch_add(block.size(), Relaxed) + block.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(block) }
    }

    /// # Safety
    /// That of the system's allocator.
    unsafe fn dealloc(&self, data: *mut u8, block: Block) {
        LIVE.fetch_sub(block.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(data, block) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The allocated bytes that remain of `run` while its result lives.
#[allow(dead_code, reason = "not all tests of memory need it")]
pub(crate) fn kept_by<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.load(Relaxed);
    let result = run();
    (result, LIVE.load(Relaxed) - before)
}

/// The peak of allocated bytes during `run`, above those before it.
pub(crate) fn peak_of(run: impl FnOnce()) -> usize {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    run();
    PEAK.load(Relaxed) - before
}
