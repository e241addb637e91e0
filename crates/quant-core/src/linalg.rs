//! Linear algebra on the host, by faer: Cholesky factors, eigenvectors, singular vectors, products.
//!
//! Matrices are row by row. Work is split into parts of fixed sizes, one thread to each, so that
//! results have the same bits for any number of threads.

use faer::col::ColMut;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{
    LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::traits::RealField;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Rows and columns of a block of a factorization.
const BLOCK: usize = 256;
/// Columns of a part of a product.
const COLUMNS: usize = 256;

/// A matrix that has no Cholesky factor.
#[derive(Debug)]
pub(crate) struct NotPositive;

/// The type of a matrix that is factored.
pub(crate) trait Real: RealField + Copy + Send + Sync {
    fn of(value: f32) -> Self;
    fn is_finite(self) -> bool;
    const MINUS_ONE: Self;
    const ONE: Self;
    const ZERO: Self;
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            fn of(value: f32) -> Self {
                value.into()
            }
            fn is_finite(self) -> bool {
                <$t>::is_finite(self)
            }
            const MINUS_ONE: Self = -1.0;
            const ONE: Self = 1.0;
            const ZERO: Self = 0.0;
        }
    };
}
real!(f32);
real!(f64);

/// The inverse of the lower Cholesky factor of a symmetric matrix `a`, `[n, n]`.
///
/// Only the lower triangle of `a` is read. The result is lower triangular, with zeros above.
///
/// OPTQ needs the Cholesky factor of `a⁻¹ = L⁻ᵀ L⁻¹`. If rows and columns are reversed, that is `L⁻¹`
/// itself: one factorization and one inversion, where the reference takes three.
pub(crate) fn inverse_cholesky<T: Real>(mut a: Vec<T>, n: usize) -> Result<Vec<T>, NotPositive> {
    cholesky(&mut a, n)?;
    let mut inverse = vec![T::ZERO; n * n];
    invert_lower(&a, &mut inverse, n);
    if inverse.par_iter().all(|value| value.is_finite()) {
        Ok(inverse)
    } else {
        Err(NotPositive)
    }
}

/// The eigenvalues of a symmetric matrix in ascending order, and its eigenvectors.
///
/// Runs on one thread, for small matrices. Returns `None` if it does not converge, or if `a` is not
/// finite.
///
/// # Shapes
/// - `a`: `[n, n]`, of which the lower triangle is read
/// - eigenvectors: `[n, n]`, one in each column
///
/// # Examples
/// ```
/// let (values, _) = quant_core::symmetric_eigen(&[2.0, 1.0, 1.0, 2.0], 2).unwrap();
/// assert!((values[0] - 1.0).abs() < 1e-12 && (values[1] - 3.0).abs() < 1e-12);
/// assert!(quant_core::symmetric_eigen(&[f64::NAN], 1).is_none());
/// ```
pub fn symmetric_eigen(a: &[f64], n: usize) -> Option<(Vec<f64>, Vec<f64>)> {
    if a.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let a = MatRef::from_row_major_slice(a, n, n);
    let (mut values, mut vectors) = (vec![0.0; n], vec![0.0; n * n]);
    let scratch =
        self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    let diagonal = ColMut::from_slice_mut(&mut values).as_diagonal_mut();
    let u = MatMut::from_row_major_slice_mut(&mut vectors, n, n);
    let stack = MemStack::new(&mut memory);
    self_adjoint_evd(a, diagonal, Some(u), Par::Seq, stack, Default::default()).ok()?;
    Some((values, vectors))
}

/// The full singular value decomposition of a matrix, `a = u diag(s) vᵀ`, as `[u, s, v]`.
///
/// Runs on one thread, which takes minutes for `n = 4096`. Returns `None` if it does not converge, or
/// if `a` is not finite.
///
/// # Shapes
/// - `a`: `[m, n]`
/// - `u`: `[m, k]`, where `k = min(m, n)`
/// - `s`: `[k]`, in descending order
/// - `v`: `[n, k]`
///
/// # Examples
/// ```
/// let [_, s, _] = quant_core::full_svd(&[0.0, 3.0, 4.0, 0.0], 2, 2).unwrap();
/// assert!((s[0] - 4.0).abs() < 1e-6 && (s[1] - 3.0).abs() < 1e-6);
/// assert!(quant_core::full_svd(&[f32::INFINITY], 1, 1).is_none());
/// ```
pub fn full_svd(a: &[f32], m: usize, n: usize) -> Option<[Vec<f32>; 3]> {
    if a.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let k = m.min(n);
    let a = MatRef::from_row_major_slice(a, m, n);
    let (mut u, mut s, mut v) = (vec![0.0; m * k], vec![0.0; k], vec![0.0; n * k]);
    let vectors = ComputeSvdVectors::Thin;
    let scratch = svd_scratch::<f32>(m, n, vectors, vectors, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    svd(
        a,
        ColMut::from_slice_mut(&mut s).as_diagonal_mut(),
        Some(MatMut::from_row_major_slice_mut(&mut u, m, k)),
        Some(MatMut::from_row_major_slice_mut(&mut v, n, k)),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .ok()?;
    Some([u, s, v])
}

/// The upper triangular `R` with `Rᵀ R = a`, with zeros below, for a symmetric matrix `a`, `[n, n]`.
///
/// Only the lower triangle of `a` is read.
pub(crate) fn root(mut a: Vec<f64>, n: usize) -> Result<Vec<f32>, NotPositive> {
    cholesky(&mut a, n)?;
    let mut root = vec![0.0f32; n * n];
    let rows = root.par_chunks_exact_mut(n).enumerate();
    rows.for_each(|(i, row)| {
        for (j, value) in row.iter_mut().enumerate().skip(i) {
            *value = a[j * n + i] as f32;
        }
    });
    if root.par_iter().all(|value| value.is_finite()) {
        Ok(root)
    } else {
        Err(NotPositive)
    }
}

/// Replaces the lower triangle by the lower Cholesky factor, block column by block column.
fn cholesky<T: Real>(a: &mut [T], n: usize) -> Result<(), NotPositive> {
    let scratch = cholesky_in_place_scratch::<T>(BLOCK, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    for start in (0..n).step_by(BLOCK) {
        let end = n.min(start + BLOCK);
        let rest = MatMut::from_row_major_slice_mut(&mut a[start * n..], n - start, n);
        let (mut block, mut below) = rest
            .subcols_mut(start, n - start)
            .split_at_row_mut(end - start);
        let mut diagonal = block.as_mut().subcols_mut(0, end - start);
        cholesky_in_place(
            diagonal.as_mut(),
            LltRegularization::default(),
            Par::Seq,
            MemStack::new(&mut memory),
            Default::default(),
        )
        .map_err(|_| NotPositive)?;

        // The rows below: `L[i, k] = A[i, k] L[k, k]⁻ᵀ`.
        let diagonal = diagonal.as_ref();
        below.as_mut().par_row_chunks_mut(BLOCK).for_each(|rows| {
            let rows = rows.subcols_mut(0, end - start).transpose_mut();
            solve_lower_triangular_in_place(diagonal, rows, Par::Seq);
        });
        // The trailing matrix: `A[i, j] -= L[i, k] L[j, k]ᵀ` for `j <= i`.
        let (panel, trailing) = below.split_at_col_mut(end - start);
        let panel = panel.as_ref();
        let chunks = trailing.par_row_chunks_mut(BLOCK).enumerate();
        chunks.for_each(|(k, rows)| {
            let first = k * BLOCK;
            let n_rows = rows.nrows();
            let of_rows = panel.subrows(first, n_rows);
            let (before, diagonal) = rows.subcols_mut(0, first + n_rows).split_at_col_mut(first);
            matmul(
                before,
                Accum::Add,
                of_rows,
                panel.subrows(0, first).transpose(),
                T::MINUS_ONE,
                Par::Seq,
            );
            triangular::matmul(
                diagonal,
                BlockStructure::TriangularLower,
                Accum::Add,
                of_rows,
                BlockStructure::Rectangular,
                of_rows.transpose(),
                BlockStructure::Rectangular,
                T::MINUS_ONE,
                Par::Seq,
            );
        });
    }
    Ok(())
}

/// Inverts a lower triangular matrix, each block of columns by forward substitution.
fn invert_lower<T: Real>(l: &[T], inverse: &mut [T], n: usize) {
    let l = MatRef::from_row_major_slice(l, n, n);
    let inverse = MatMut::from_row_major_slice_mut(inverse, n, n);
    let columns = inverse.par_col_chunks_mut(BLOCK).enumerate();
    columns.for_each(|(k, columns)| {
        let first = k * BLOCK;
        let mut columns = columns.subrows_mut(first, n - first);
        for j in 0..columns.ncols() {
            columns[(j, j)] = T::ONE;
        }
        let l = l.submatrix(first, first, n - first, n - first);
        solve_lower_triangular_in_place(l, columns, Par::Seq);
    });
}

/// Computes `c += alpha aᵀ b`, with `a [k, m]` in rows of `a_stride`, `b [k, n]` and `c [m, n]`.
pub(crate) fn add_transposed_product(
    c: &mut [f32],
    a: &[f32],
    a_stride: usize,
    b: &[f32],
    n: usize,
    alpha: f32,
) {
    let (k, m) = (b.len() / n, c.len() / n);
    if m == 0 {
        return;
    }
    let a = MatRef::from_row_major_slice_with_stride(a, k, m, a_stride).transpose();
    let b = MatRef::from_row_major_slice(b, k, n);
    let c = MatMut::from_row_major_slice_mut(c, m, n);
    let parts = c.par_col_chunks_mut(COLUMNS).enumerate();
    parts.for_each(|(part, c)| {
        let b = b.subcols(part * COLUMNS, c.ncols());
        matmul(c, Accum::Add, a, b, alpha, Par::Seq);
    });
}

/// Returns `alpha strictly_lower(d lᵀ) l`, with `l` lower triangular; all are `[n, n]`.
pub(crate) fn drift_of_factor(mut d: Vec<f32>, l: &[f32], n: usize, alpha: f32) -> Vec<f32> {
    let mut product = vec![0.0; n * n];
    {
        let (d, l) = (
            MatRef::from_row_major_slice(&d, n, n),
            MatRef::from_row_major_slice(l, n, n),
        );
        let rows = MatMut::from_row_major_slice_mut(&mut product, n, n);
        let parts = rows.par_row_chunks_mut(COLUMNS).enumerate();
        parts.for_each(|(part, rows)| {
            let d = d.subrows(part * COLUMNS, rows.nrows());
            matmul(rows, Accum::Replace, d, l.transpose(), alpha, Par::Seq);
        });
    }
    for (p, row) in product.chunks_exact_mut(n).enumerate() {
        row[p..].fill(0.0);
    }
    let l = MatRef::from_row_major_slice(l, n, n);
    let product = MatRef::from_row_major_slice(&product, n, n);
    let rows = MatMut::from_row_major_slice_mut(&mut d, n, n);
    let parts = rows.par_row_chunks_mut(COLUMNS).enumerate();
    parts.for_each(|(part, rows)| {
        let product = product.subrows(part * COLUMNS, rows.nrows());
        matmul(rows, Accum::Replace, product, l, 1.0, Par::Seq);
    });
    d
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A positive definite matrix `m mᵀ + I`.
    fn positive(n: usize) -> Vec<f64> {
        let entry = |i: usize, j: usize| ((i * 37 + j * 101) % 97) as f64 / 97.0 - 0.5;
        let mut a = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                a[i * n + j] = (0..8).map(|k| entry(i, k) * entry(j, k)).sum::<f64>();
            }
            a[i * n + i] += 1.0;
        }
        a
    }

    #[test]
    fn the_inverse_factor_whitens() {
        // A block, and a part of one.
        let n = BLOCK + 70;
        let a = positive(n);
        let l = inverse_cholesky(a.clone(), n).unwrap();
        // L⁻¹ A L⁻ᵀ = I.
        for (i, j) in [
            (0, 0),
            (5, 2),
            (n - 1, n - 1),
            (n - 1, 0),
            (BLOCK, BLOCK - 1),
        ] {
            let mut sum = 0.0;
            for p in 0..n {
                for q in 0..n {
                    sum += l[i * n + p] * a[p * n + q] * l[j * n + q];
                }
            }
            let expected = f64::from(u8::from(i == j));
            assert!((sum - expected).abs() < 1e-10, "[{i}, {j}]: {sum}");
        }
        assert_eq!(l[1], 0.0);
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let n = 2 * BLOCK + 33;
        let a: Vec<f32> = positive(n).iter().map(|&value| value as f32).collect();
        let on = |n_threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
            pool.build().unwrap().install(|| {
                let l = inverse_cholesky(a.clone(), n).unwrap();
                let mut c = a.clone();
                add_transposed_product(&mut c, &l, n, &a, n, -0.5);
                c.extend(&drift_of_factor(a.clone(), &l, n, 0.25));
                c.extend(&l);
                c.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
            })
        };
        assert!(on(1) == on(3));
    }

    #[test]
    fn an_indefinite_matrix_has_no_factor() {
        let mut a = positive(3);
        a[4] = -1.0;
        assert!(inverse_cholesky(a, 3).is_err());
    }
}
