//! The truncated singular value decomposition.

use burn::tensor::{Device, Tensor, TensorData};
use quant_core::{full_svd, sum_of_squares, symmetric_eigen};
use rand::RngExt;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

/// The least number of directions beside the rank, which make the iteration converge.
const OVERSAMPLING: usize = 8;
/// Products of more columns than this are faster with whole registers of them.
const REGISTERS: usize = 32;
/// Blocks of a Krylov space, before the iteration restarts from its best directions.
const BLOCKS: usize = 8;
/// Restarts before a full decomposition.
const RESTARTS: usize = 8;
/// The squared length of a direction, relative to the longest of its block, below which it is noise.
const NOISE: f64 = 1e-6;

/// A truncated decomposition: a randomized block Krylov iteration (Musco and Musco 2015,
/// arXiv:1504.05477) on the matrix's device, with small problems on the host in `f64`.
///
/// The residual of a quantizer has a flat spectrum, in which no iteration finds the singular vectors
/// themselves soon. The criterion is the error: the iteration ends when a step lowers the squared error by
/// less than [`tolerance`](Truncation::tolerance) of it, or than 10⁻⁷ of the matrix's own squares, which
/// is the rounding of `f32`. If it never does, and for matrices not much larger than the rank, the full
/// decomposition is computed, on one thread of the host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Truncation {
    /// The part of the squared error that a step must gain for the iteration to go on.
    pub tolerance: f64,
    /// The seed of the initial directions.
    pub seed: u64,
}

impl Default for Truncation {
    fn default() -> Self {
        Self {
            tolerance: 5e-4,
            seed: 0,
        }
    }
}

/// A matrix of low rank, `left · right`, near another of `[m, n]`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[m, rank]`, orthonormal columns.
    pub left: Tensor<2>,
    /// `[rank, n]`, orthogonal rows, the longest first; their norms are the singular values.
    pub right: Tensor<2>,
    /// The squared Frobenius norm of the rest of the matrix.
    pub error: f64,
    /// Orthonormal directions, `[n, k]`, to start from for a similar matrix.
    pub directions: Tensor<2>,
}

impl LowRank {
    /// The rest of `matrix`, `[m, n]`, without the low-rank one.
    pub fn taken_from(&self, matrix: Tensor<2>) -> Tensor<2> {
        kernels::add_low_rank(matrix, self.left.clone().neg(), self.right.clone())
    }

    /// Recomputes an error that is the difference of two large numbers from the matrix itself.
    fn refine_error(&mut self, matrix: &Tensor<2>, power: f64) {
        if self.error < power * 0.25 {
            self.error = sum_of_squares(self.taken_from(matrix.clone()));
        }
    }
}

impl Truncation {
    /// The best approximation of `matrix`, `[m, n]`, of a rank; `None` if it is not finite. `start` are
    /// the directions of a similar matrix to start from.
    ///
    /// # Examples
    /// ```
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use loftq::Truncation;
    ///
    /// let random = |dims| Tensor::<2>::random(dims, Distribution::Default, &Device::flex());
    /// // Of rank 2.
    /// let matrix = random([300, 2]).matmul(random([2, 200]));
    /// let found = Truncation::default().of(matrix.clone(), 2, None).unwrap();
    /// let difference = matrix - found.left.matmul(found.right);
    /// assert!(difference.abs().max().into_scalar::<f32>() < 1e-5);
    /// ```
    ///
    /// # Panics
    /// If the rank is 0 or more than `m` or `n`.
    pub fn of(&self, matrix: Tensor<2>, rank: usize, start: Option<Tensor<2>>) -> Option<LowRank> {
        let [m, n] = matrix.dims();
        assert!((1..=m.min(n)).contains(&rank), "the rank of a matrix");
        let power = sum_of_squares(matrix.clone());
        if !power.is_finite() {
            return None;
        }
        if power == 0.0 {
            return Some(nothing(&matrix, rank, power, self.seed));
        }
        // The squares of very large or small values are out of the range of f32.
        let size = (power / (m * n) as f64).sqrt();
        if !(1e-12..1e12).contains(&size) {
            let mut low = self.of(matrix / size, rank, start)?;
            low.right = low.right * size;
            low.error *= size * size;
            return Some(low);
        }
        if m.min(n) <= 3 * width(rank) {
            return full(matrix, rank, power);
        }
        let mut start =
            start.unwrap_or_else(|| random([n, width(rank)], self.seed, &matrix.device()));
        for _ in 0..RESTARTS {
            match self.krylov(&matrix, rank, start, power)? {
                (found, true) => return Some(found),
                (found, false) => start = found.directions,
            }
        }
        full(matrix, rank, power)
    }

    /// The best low rank in one Krylov space, and whether the iteration converged.
    fn krylov(
        &self,
        matrix: &Tensor<2>,
        rank: usize,
        start: Tensor<2>,
        power: f64,
    ) -> Option<(LowRank, bool)> {
        // Shorter directions are rounding.
        let (least, least_gain) = (power * 1e-12, power * 1e-7);
        // Block Golub-Kahan with full orthogonalization: the columns of `lefts` span the images of
        // `rights`, and `images` is the transposed matrix times `lefts`.
        let (mut lefts, mut images, mut rights) = (None, None, None);
        let mut right = orthonormal(start, 0.0)?;
        let mut found: Option<Ritz> = None;
        let mut converged = false;
        for _ in 0..BLOCKS {
            let left = without(matrix.clone().matmul(right.clone()), &lefts);
            let left = left.and_then(|left| orthonormal(left, least));
            grow(&mut rights, right);
            let Some(left) = left else {
                // The space holds all of the matrix, or starts where that is zero.
                converged = found.is_some();
                break;
            };
            let image = left.clone().transpose().matmul(matrix.clone()).transpose();
            grow(&mut lefts, left);
            grow(&mut images, image.clone());
            let next = Ritz::of(images.as_ref()?, rank)?;
            let gain = (found.as_ref()).map_or(f64::INFINITY, |last| next.energy - last.energy);
            let error = power - next.energy;
            found = Some(next);
            converged = gain <= (self.tolerance * error).max(least_gain);
            if converged {
                break;
            }
            match without(image, &rights).and_then(|image| orthonormal(image, least)) {
                Some(next) => right = next,
                None => {
                    converged = true;
                    break;
                }
            }
        }
        let low = match (found, lefts, images) {
            (Some(ritz), Some(lefts), Some(images)) => {
                ritz.low_rank(matrix, lefts, images, rank, power)?
            }
            _ => nothing(matrix, rank, power, self.seed),
        };
        Some((low, converged))
    }
}

/// The directions of a Krylov space, ordered by their energy in the matrix.
struct Ritz {
    /// `[size, size]`, row by row, a direction in each column, the largest last.
    vectors: Vec<f64>,
    size: usize,
    /// The squared norm of the best of the rank.
    energy: f64,
}

impl Ritz {
    fn of(images: &Tensor<2>, rank: usize) -> Option<Self> {
        let size = images.dims()[1];
        let (values, vectors) = symmetric_eigen(&gram(images.clone()), size)?;
        let energy = values.iter().rev().take(rank).sum();
        Some(Self {
            vectors,
            size,
            energy,
        })
    }

    /// The best of this rank whose columns are spanned by `lefts`, orthonormal; `images` is the
    /// transposed matrix times each of them.
    fn low_rank(
        &self,
        matrix: &Tensor<2>,
        lefts: Tensor<2>,
        images: Tensor<2>,
        rank: usize,
        power: f64,
    ) -> Option<LowRank> {
        let (size, device) = (self.size, images.device());
        let columns = |count: usize| {
            let count = count.min(size);
            let entry = |at: usize| self.vectors[at / count * size + size - 1 - at % count];
            to_device((0..size * count).map(entry), [size, count], &device)
        };
        let kept = columns(rank);
        let left = lefts.matmul(kept.clone());
        let right = images.clone().matmul(kept).transpose();
        let directions = images.matmul(columns(width(rank)));
        let mut low = LowRank {
            error: (power - sum_of_squares(right.clone())).max(0.0),
            left: padded(left, rank, 1),
            right: padded(right, rank, 0),
            directions: orthonormal(directions, 0.0)?,
        };
        low.refine_error(matrix, power);
        Some(low)
    }
}

/// Pads a matrix with zeros to `rank` in a dimension.
pub(crate) fn padded(matrix: Tensor<2>, rank: usize, dim: usize) -> Tensor<2> {
    let mut dims = matrix.dims();
    let missing = rank - dims[dim];
    if missing == 0 {
        return matrix;
    }
    dims[dim] = missing;
    let zeros = Tensor::zeros(dims, &matrix.device());
    Tensor::cat(vec![matrix, zeros], dim)
}

/// The low rank of zeros.
fn nothing(matrix: &Tensor<2>, rank: usize, power: f64, seed: u64) -> LowRank {
    let ([m, n], device) = (matrix.dims(), matrix.device());
    LowRank {
        left: Tensor::zeros([m, rank], &device),
        right: Tensor::zeros([rank, n], &device),
        error: power,
        directions: random([n, width(rank)], seed, &device),
    }
}

/// The low rank from the full decomposition.
fn full(matrix: Tensor<2>, rank: usize, power: f64) -> Option<LowRank> {
    let ([m, n], device) = (matrix.dims(), matrix.device());
    let values = matrix.clone().into_data().convert::<f32>();
    let [u, _, v] = full_svd(values.as_slice().expect("converted to f32"), m, n)?;
    let k = m.min(n);
    let first = |values: &[f32], rows: usize, count: usize| {
        let values = (0..rows * count).map(|at| f64::from(values[at / count * k + at % count]));
        to_device(values, [rows, count], &device)
    };
    let left = first(&u, m, rank);
    let right = left.clone().transpose().matmul(matrix.clone());
    let mut low = LowRank {
        error: (power - sum_of_squares(right.clone())).max(0.0),
        left,
        right,
        directions: first(&v, n, width(rank).min(k)),
    };
    low.refine_error(&matrix, power);
    Some(low)
}

/// The number of columns of a block for this rank.
fn width(rank: usize) -> usize {
    match rank + OVERSAMPLING {
        width if width > REGISTERS => width.next_multiple_of(16),
        width => width,
    }
}

/// The part of `block` that is orthogonal to `basis`; none if it is zero.
fn without(mut block: Tensor<2>, basis: &Option<Tensor<2>>) -> Option<Tensor<2>> {
    let Some(basis) = basis else {
        return Some(block);
    };
    let before = sum_of_squares(block.clone());
    // Twice is enough (Giraud et al. 2005).
    for _ in 0..2 {
        let overlap = basis.clone().transpose().matmul(block.clone());
        block = block - basis.clone().matmul(overlap);
    }
    (sum_of_squares(block.clone()) > before * 1e-12).then_some(block)
}

/// Appends columns.
fn grow(basis: &mut Option<Tensor<2>>, block: Tensor<2>) {
    *basis = Some(match basis.take() {
        Some(basis) => Tensor::cat(vec![basis, block], 1),
        None => block,
    });
}

/// An orthonormal basis of the columns of `block`, without directions whose squared lengths are at most
/// `least` or noise beside the longest; none if that is all of them.
pub(crate) fn orthonormal(mut block: Tensor<2>, least: f64) -> Option<Tensor<2>> {
    let mut least = least;
    for _ in 0..4 {
        let size = block.dims()[1];
        let gram = gram(block.clone());
        let off = (0..size * size).map(|at| (gram[at] - f64::from(at / size == at % size)).abs());
        if off.fold(0.0, f64::max) < 1e-6 {
            break;
        }
        let (values, vectors) = symmetric_eigen(&gram, size)?;
        let longest = values.last().copied().filter(|&longest| longest > least)?;
        let first = values.partition_point(|&value| value <= (longest * NOISE).max(least));
        let count = size - first;
        let entries = (0..size * count).map(|at| {
            let column = first + at % count;
            vectors[at / count * size + column] / values[column].sqrt()
        });
        block = block
            .clone()
            .matmul(to_device(entries, [size, count], &block.device()));
        least = 0.0;
    }
    Some(block)
}

/// `blockᵀ block`, row by row.
fn gram(block: Tensor<2>) -> Vec<f64> {
    let product = block.clone().transpose().matmul(block);
    let values = product.into_data().convert::<f64>();
    values.try_into_vec().expect("converted to f64")
}

fn to_device(values: impl Iterator<Item = f64>, dims: [usize; 2], device: &Device) -> Tensor<2> {
    let values: Vec<f32> = values.map(|value| value as f32).collect();
    Tensor::from_data(TensorData::new(values, dims), device)
}

fn random(dims: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..dims[0] * dims[1]).map(|_| rng.random_range(-1.0..1.0));
    to_device(values, dims, device)
}
