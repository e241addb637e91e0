//! Products of dense matrices on the host.

use gemm::Parallelism;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use crate::fixed;

/// Rows and columns of a task of a product.
const TASK: usize = 256;

/// A result whose parts are written by several tasks.
pub(crate) struct Shared(*mut f32);

// SAFETY: the tasks write disjoint parts, as the comments where they do so say.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new(values: &mut [f32]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// # Safety
    /// `n` lies within the result.
    pub(crate) unsafe fn offset(&self, n: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(n) }
    }
}

/// A strided matrix that is read.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) data: *const f32,
    pub(crate) row_stride: isize,
    pub(crate) column_stride: isize,
}

impl Matrix {
    pub(crate) fn new(data: *const f32, row_stride: usize, column_stride: usize) -> Self {
        Self {
            data,
            row_stride: row_stride as isize,
            column_stride: column_stride as isize,
        }
    }

    /// The matrix from an element on.
    pub(crate) fn at(self, row: usize, column: usize) -> Self {
        let at = row as isize * self.row_stride + column as isize * self.column_stride;
        Self {
            data: self.data.wrapping_offset(at),
            ..self
        }
    }

    pub(crate) fn transpose(self) -> Self {
        Self {
            data: self.data,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// A matrix that is only read, by several threads.
pub(crate) struct Read(pub(crate) Matrix);

// SAFETY: reading from several threads is safe.
unsafe impl Sync for Read {}

/// `c = a · b`, or `c += a · b` if `add`, with all threads; `c` is in rows of `c_stride`.
/// As accurate as in f32, relative to the largest of each 256 factors of a sum; the number of threads
/// changes no bit.
///
/// # Safety
/// `a [m, k]` and `b [k, n]` lie within their allocations.
pub(crate) unsafe fn product(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    c: &mut [f32],
    c_stride: usize,
    add: bool,
) {
    assert!(m == 0 || n <= c_stride && (m - 1) * c_stride + n <= c.len());
    if m == 0 || n == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    if unsafe { fixed::dense::product([m, k, n], a, b, c, c_stride, add) } {
        return;
    }
    let (a, b, c) = (&Read(a), &Read(b), &Shared::new(c));
    let across = n.div_ceil(TASK);
    (0..m.div_ceil(TASK) * across)
        .into_par_iter()
        .for_each(|task| {
            let (row, column) = (task / across * TASK, task % across * TASK);
            let dims = [TASK.min(m - row), k, TASK.min(n - column)];
            // SAFETY: the part lies within `c`, checked above, and is no other task's; the caller
            // promises the rest.
            unsafe {
                let c = c.offset(row * c_stride + column);
                multiply_add(dims, a.0.at(row, 0), b.0.at(0, column), c, c_stride, add);
            }
        });
}

/// `c = a · b`, or `c += a · b` if `add`, with `a [m, k]`, `b [k, n]` and `c [m, n]` in rows of
/// `c_stride`; on the calling thread.
///
/// # Safety
/// The three lie within their allocations, and nobody else writes `c`.
pub(crate) unsafe fn multiply_add(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    c: *mut f32,
    c_stride: usize,
    add: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            c_stride as isize,
            add,
            a.data,
            a.column_stride,
            a.row_stride,
            b.data,
            b.column_stride,
            b.row_stride,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// Few rows and many, in one panel and several, with either order of the second factor.
    #[test]
    fn products_are_the_sums() {
        for ([m, k, n], (transposed, add)) in
            [[3, 5, 7], [11, 64, 64], [17, 300, 65], [530, 1300, 70]]
                .into_iter()
                .flat_map(|dims| {
                    [(false, false), (false, true), (true, false), (true, true)]
                        .map(|of| (dims, of))
                })
        {
            let mut random = Random::new(7);
            let (a, b) = (
                random.floats(m * k, -1.0, 1.0),
                random.floats(k * n, -1.0, 1.0),
            );
            let stride = n + 3;
            let before = random.floats(m * stride, -1.0, 1.0);
            let mut c = before.clone();
            let strides = if transposed { (1, k) } else { (n, 1) };
            let of_b = Matrix::new(b.as_ptr(), strides.0, strides.1);
            // SAFETY: the matrices are of these sizes.
            unsafe {
                product(
                    [m, k, n],
                    Matrix::new(a.as_ptr(), k, 1),
                    of_b,
                    &mut c,
                    stride,
                    add,
                )
            };
            for (at, (&found, &before)) in c.iter().zip(&before).enumerate() {
                let (row, column) = (at / stride, at % stride);
                if column >= n {
                    assert_eq!(found, before, "beside the product");
                    continue;
                }
                if row % 37 > 2 {
                    continue;
                }
                let term = |i: usize| {
                    f64::from(a[row * k + i]) * f64::from(b[i * strides.0 + column * strides.1])
                };
                let sum: f64 = (0..k).map(term).sum();
                let expected = sum + if add { f64::from(before) } else { 0.0 };
                let error = (f64::from(found) - expected).abs();
                assert!(
                    error <= 2e-7 * (k as f64),
                    "{found} for {expected} at {row}, {column}"
                );
            }
        }
    }
}
