//! Large buffers.

/// Buffers from this size on are asked for in huge pages: on a system that maps memory in pages of
/// 4 KiB, touching them for the first time takes longer than what is computed into them.
#[cfg(target_os = "linux")]
const HUGE: usize = 4 << 20;

/// `n` zeros.
pub(crate) fn zeroed<T: Zero>(n: usize) -> Vec<T> {
    let buffer = vec![T::ZERO; n];
    #[cfg(target_os = "linux")]
    if size_of_val(buffer.as_slice()) >= HUGE {
        const PAGE: usize = 2 << 20;
        let range = buffer.as_ptr_range();
        let start = (range.start as usize).next_multiple_of(PAGE);
        let end = range.end as usize / PAGE * PAGE;
        // SAFETY: the pages lie within the buffer. The advice changes how they are mapped, not what
        // they hold; where it is refused, they stay as they are.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE);
        }
    }
    buffer
}

/// A number whose zero is all zero bits, for which the system need not be asked to clear memory.
pub(crate) trait Zero: Copy {
    const ZERO: Self;
}

impl Zero for f32 {
    const ZERO: Self = 0.0;
}

impl Zero for u32 {
    const ZERO: Self = 0;
}

impl Zero for u8 {
    const ZERO: Self = 0;
}

impl Zero for i8 {
    const ZERO: Self = 0;
}
